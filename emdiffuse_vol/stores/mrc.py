"""Reading MRC (the 2014 format and its IMOD dialect): a header of 1024 bytes, an extended one, then the greys.

Convention: sections, rows, columns as ``MAPS``, ``MAPR``, ``MAPC`` say which of z, y and x they are. Cell sizes are
angstrom. The file is mapped anew for every read. Bytes are signed (int8 greys are read as int16) unless IMOD's stamp
says that they are not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import AXES, Box, Triple
from emdiffuse_vol.stores.spec import digest_of, make_spec
from emdiffuse_vol.stores.volume import Nanometres, VolumeSpec

HEADER = 1024
MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2"}
IMOD_STAMP, IMOD_SIGNED = 1146047817, 1
ANGSTROM = 0.1  # nm

HEADER_FIELDS = np.dtype(
    {
        "names": ["size", "mode", "grid", "cell", "map", "extended", "stamp", "flags"],
        "formats": ["(3,)i4", "i4", "(3,)i4", "(3,)f4", "(3,)i4", "i4", "i4", "i4"],
        "offsets": [0, 12, 28, 40, 64, 92, 152, 156],
        "itemsize": HEADER,
    }
)


@dataclass(eq=False)
class MrcVolume:
    """stored: shape of the file's sections, rows, columns; order: where z, y and x are among them."""

    url: str
    options: dict[str, Any]
    spec: VolumeSpec
    offset: int
    dtype: np.dtype[Any] = field(repr=False)
    stored: Triple = field(repr=False)
    order: Triple = field(repr=False)

    def read(self, box: Box) -> NDArray[Any]:
        assert box in Box.of(self.spec.shape), f"box {box} is not inside shape {self.spec.shape}"
        try:
            greys = np.memmap(self.url, self.dtype, "r", self.offset, self.stored)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.url} is damaged: {error}; copy it again from its source") from error
        return np.ascontiguousarray(greys.transpose(self.order)[box.slices()], self.spec.dtype)


def is_mrc(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(HEADER)
    return len(start) == HEADER and start[208:211] == b"MAP"


def open_mrc(path: Path, *, voxel_size: Nanometres | None = None) -> MrcVolume:
    """``voxel_size`` overrides the header. Raises InputError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(HEADER)
    order: Literal["<", ">"] = ">" if start[212] == 0x11 else "<"
    header = np.frombuffer(start, HEADER_FIELDS.newbyteorder(order))[0]
    mode, extended = int(header["mode"]), int(header["extended"])
    if mode not in MODES:
        raise InputError(f"{path} has MRC mode {mode}, expected one of {', '.join(map(str, MODES))}; convert its greys")
    dtype = np.dtype(order + MODES[mode])
    if mode == 0 and header["stamp"] == IMOD_STAMP and not header["flags"] & IMOD_SIGNED:
        dtype = np.dtype("u1")
    columns, rows, sections = (int(n) for n in header["size"])
    stored = (sections, rows, columns)
    if min(stored) < 1 or extended < 0:
        raise InputError(f"{path} has shape {stored} and an extended header of {extended} bytes; copy it again")
    if (end := HEADER + extended + prod(stored) * dtype.itemsize) > size:
        raise InputError(f"{path} ends after {size} bytes, expected {end}; copy it again from its source")
    names = {1: "x", 2: "y", 3: "z"}
    # Old writers leave the order of axes at 0.
    axes = [names.get(int(n), "?") for n in reversed(header["map"])] if any(header["map"]) else list(AXES)
    if sorted(map(str, axes)) != sorted(AXES):
        raise InputError(
            f"{path} says its axes are {header['map'].tolist()}, expected 1, 2 and 3 once each; correct it"
        )
    z, y, x = (axes.index(a) for a in AXES)
    spec = make_spec(
        path.name,
        shape=(stored[z], stored[y], stored[x]),
        dtype="int16" if dtype.str == "|i1" else dtype.name,
        voxel_size=voxel_size or _voxel_size(header),
        format="MRC",
        digest=digest_of([path.name, size, start.hex()]),
    )
    return MrcVolume(str(path), {"voxel_size": voxel_size}, spec, HEADER + extended, dtype, stored, (z, y, x))


def _voxel_size(header: Any) -> Nanometres | None:
    """The cell over the grid that samples it; both count x, y, z. None where the header leaves one of them out."""
    grid, cell = header["grid"].tolist(), header["cell"].tolist()
    if min(grid) < 1 or not all(0 < c < np.inf for c in cell):
        return None
    x, y, z = (c / n * ANGSTROM for c, n in zip(cell, grid, strict=True))
    return z, y, x
