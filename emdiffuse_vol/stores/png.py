"""Grey PNG images, as stacks of one section: what a screenshot or a paper's supplement is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import InputError, OutputError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.spec import digest_of, make_spec
from emdiffuse_vol.stores.volume import Nanometres, VolumeSpec

SIGNATURE = b"\x89PNG\r\n\x1a\n"
DTYPES = {"L": "uint8", "I;16": "uint16", "I;16B": "uint16"}


@dataclass(eq=False)
class PngVolume:
    """greys: [1, y, x]."""

    url: str
    options: dict[str, Any]
    spec: VolumeSpec
    greys: NDArray[Any] = field(repr=False)

    def read(self, box: Box) -> NDArray[Any]:
        assert box in Box.of(self.spec.shape), f"box {box} is not inside shape {self.spec.shape}"
        return self.greys[box.slices()]


def is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def open_png(path: Path, *, voxel_size: Nanometres | None = None) -> PngVolume:
    """The image is read whole. ``voxel_size`` must be given: a PNG has none. Raises InputError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            mode = image.mode
            greys = np.asarray(image)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is damaged or too large for a PNG: {error}; copy it again, or give a TIFF") from error
    if mode not in DTYPES:
        raise InputError(f"{path} holds pixels of kind {mode}, expected grey ones of 8 or 16 bits; convert it to grey")
    greys = greys.astype(DTYPES[mode])[None]
    spec = make_spec(
        path.name,
        shape=(1, *greys.shape[1:]),
        dtype=DTYPES[mode],
        voxel_size=voxel_size,
        format="PNG",
        digest=digest_of([path.name, path.stat().st_size, greys.shape]),
    )
    return PngVolume(str(path), {"voxel_size": voxel_size}, spec, greys)


def check_png(path: Path, sections: int, dtype: str) -> None:
    """Raises OutputError for what a PNG cannot hold."""
    if sections != 1 or dtype not in DTYPES.values():
        raise OutputError(
            f"a PNG holds one section of uint8 or uint16, found {sections} of {dtype}; write {path.stem}.tif"
        )


def write_png(path: Path, greys: NDArray[Any]) -> None:
    """greys: [1, y, x], uint8 or uint16. Raises OutputError."""
    from PIL import Image

    check_png(path, len(greys), str(greys.dtype))
    try:
        Image.fromarray(greys[0]).save(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; choose another place") from error
