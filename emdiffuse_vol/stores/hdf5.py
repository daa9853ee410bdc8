"""Reading HDF5: ``file.h5:/path/of/dataset``, or ``file.h5`` alone where there is one volume in it.

Convention: datasets are z, y, x, or c, z, y, x; axes of size 1 before and after these do not count. Voxel size from the
attributes ``resolution`` (nm, as CREMI has it, ``offset`` being the origin), ``element_size_um`` (ilastik, Fiji) or
``voxel_size`` (nm), each z, y, x. The file is opened for every read. A dataset lies in the file that is given: links to
other files, and datasets kept in other files, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.chunked import LARGEST_CHUNK, choose_region
from emdiffuse_vol.stores.kvstore import is_remote
from emdiffuse_vol.stores.spec import digest_of, make_spec
from emdiffuse_vol.stores.volume import Nanometres, VolumeSpec

MAGIC = b"\x89HDF\r\n\x1a\n"
UNREADABLE = (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError)
DEEPEST = 16  # links that lead to links
LISTED = 8  # names in a message
SCALES = {"resolution": 1.0, "voxel_size": 1.0, "element_size_um": 1000.0}  # attribute: nm


@dataclass(eq=False)
class Hdf5Volume:
    """lead: index of the axes before z, y, x; trail: of those after."""

    url: str
    options: dict[str, Any]
    spec: VolumeSpec
    file: Path
    dataset: str
    lead: tuple[int, ...] = field(repr=False)
    trail: tuple[int, ...] = field(repr=False)

    def read(self, box: Box) -> NDArray[Any]:
        assert box in Box.of(self.spec.shape), f"box {box} is not inside shape {self.spec.shape}"
        try:
            with _opened(self.file) as file:
                greys = _find(file, self.dataset)[(*self.lead, *box.slices(), *self.trail)]
        except UNREADABLE as error:
            raise InputError(f"{self.url} is damaged at {box}: {_line(error)}; copy it again") from error
        return np.ascontiguousarray(greys, self.spec.dtype)


def is_hdf5(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def split_url(url: str) -> tuple[Path, str]:
    """file.h5:/volumes/raw -> the file, /volumes/raw; without a dataset the second is empty."""
    file, colon, dataset = url.rpartition(":/")
    return (Path(file), "/" + dataset) if colon and not is_remote(url) else (Path(url), "")


def open_hdf5(url: str, *, voxel_size: Nanometres | None = None, channel: int | str | None = None) -> Hdf5Volume:
    """``voxel_size`` overrides the attributes. Raises InputError."""
    path, name = split_url(url)
    try:
        with _opened(path) as file:
            name = name or _only(path, file)
            return _describe(url, path, name, _find(file, name), voxel_size, channel)
    except UNREADABLE as error:
        raise InputError(f"{url} cannot be read as HDF5: {_line(error)}; check the path or copy it again") from error


def _describe(
    url: str, path: Path, name: str, dataset: Any, voxel_size: Nanometres | None, channel: int | str | None
) -> Hdf5Volume:
    shape = tuple(map(int, dataset.shape))
    lead, trail = len(shape) - 3, 0
    while lead > 0 and shape[-1 - trail] == 1:
        lead, trail = lead - 1, trail + 1
    if lead < 0:
        raise InputError(f"{url} has shape {shape}, expected z, y, x; choose another dataset")
    axes = [*(f"axis {i}" for i in range(lead - 1)), "c"][-lead:] if lead else []
    region = choose_region(url, [*axes, *"zyx", *["1"] * trail], shape, channel)
    depth, height, width = shape[lead : lead + 3]
    if dataset.chunks and (size := prod(dataset.chunks) * dataset.dtype.itemsize) > LARGEST_CHUNK:
        raise InputError(f"{url} is stored in chunks of {size} bytes, expected at most {LARGEST_CHUNK}; rewrite it")
    size_nm, origin = _position(dataset.attrs)
    spec = make_spec(
        url,
        shape=(depth, height, width),
        dtype=dataset.dtype.name,
        voxel_size=voxel_size or size_nm,
        origin=origin,
        chunk=tuple(dataset.chunks[lead : lead + 3]) if dataset.chunks else None,
        format="HDF5",
        digest=digest_of([path.name, path.stat().st_size, name, list(region)]),
    )
    options = {"voxel_size": voxel_size, "channel": channel}
    return Hdf5Volume(url, options, spec, path, name, tuple(i or 0 for i in region[:lead]), (0,) * trail)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise InputError("HDF5 needs h5py; pip install 'emdiffuse_vol[formats]'") from error
    # Locks, but not where the file system has none. Another choice would clash with whoever else in this process has
    # the file open.
    with h5py.File(path, "r", locking="best-effort") as file:
        yield file


def _find(file: Any, name: str, depth: int = 0) -> Any:
    """The dataset ``name``, through links inside this file only. Raises InputError."""
    import h5py

    node, walked = file, ""
    parts = [part for part in name.split("/") if part]
    for i, part in enumerate(parts):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if isinstance(link, h5py.ExternalLink):
            raise InputError(f"{name} leads to another file, {link.filename}; give that file itself")
        if isinstance(link, h5py.SoftLink):
            if depth >= DEEPEST:
                raise InputError(f"{name} is a link that leads to itself; give the path of a dataset")
            target = link.path if link.path.startswith("/") else f"{walked}/{link.path}"
            return _find(file, "/".join([target, *parts[i + 1 :]]), depth + 1)
        if link is None:
            raise InputError(f"{file.filename} has no {name}; it holds {_listed(_volumes(file))}")
        node, walked = node[part], f"{walked}/{part}"
    if not isinstance(node, h5py.Dataset) or node.dtype.hasobject or node.dtype.names or node.shape is None:
        raise InputError(f"{name} of {file.filename} is no array of numbers; it holds {_listed(_volumes(file))}")
    if node.external or node.is_virtual:
        raise InputError(f"{name} of {file.filename} lies in other files; copy it into one")
    return node


def _volumes(file: Any) -> list[str]:
    """Datasets with three axes or more; links are not followed."""
    import h5py

    found: list[str] = []

    def look(name: str, node: Any) -> bool | None:
        if isinstance(node, h5py.Dataset) and node.ndim >= 3:
            found.append("/" + name)
        return True if len(found) > LISTED else None

    file.visititems(look)
    return found


def _only(path: Path, file: Any) -> str:
    found = _volumes(file)
    if len(found) != 1:
        raise InputError(f"{path} holds {_listed(found)}; give one as {path.name}:/path")
    return found[0]


def _listed(names: list[str]) -> str:
    more = " and more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more if names else "no volume"


def _position(attributes: Any) -> tuple[Nanometres | None, Nanometres]:
    """Voxel size, where stated, and origin."""
    size: Nanometres | None = None
    origin = (0.0, 0.0, 0.0)
    for name, nm in SCALES.items():
        if name in attributes:
            z, y, x = (float(v) * nm for v in np.ravel(attributes[name])[:3])
            size = z, y, x
            break
    if size is not None and "offset" in attributes:
        z, y, x = (float(v) for v in np.ravel(attributes["offset"])[:3])
        origin = z, y, x
    return size, origin


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
