"""Whole shards of an output image, written by exactly one process each.

Convention: an image made by ``image.create_image`` with axes c z y x; boxes are z y x. Functions are given boxes
whose shards nobody else writes, and return when the bytes are on disk (tensorstore: file, fsync, rename, fsync of the
folder). A killed writer leaves an old shard, a new one or none, never a torn one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.image import coarsen, finish, open_array, write_units


def write_block(image: Path, box: Box, values: NDArray[Any]) -> None:
    """values: [c, z, y, x] for ``box`` of level 0. Raises OutputError when it cannot be written."""
    finish(write_units(open_array(str(image), 0, "w"), box, values))


def build_block(image: Path, level: int, box: Box) -> None:
    """Compute ``box`` of a level from the level above it, and write it."""
    values = coarsen(open_array(str(image), level - 1), box)
    finish(write_units(open_array(str(image), level, "w"), box, values))
