"""Whole shards of an output image, written by exactly one process each.

Convention: an image made by ``image.create_image`` with axes c z y x; boxes are z y x. Functions are given boxes
whose shards nobody else writes, and return when the bytes are on disk (tensorstore: file, fsync, rename, fsync of the
folder). A killed writer leaves an old shard, a new one or none, never a torn one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.image import coarsen, finish, open_array, write_units
from emdiffuse_vol.stores.kvstore import reason


def build_block(image: Path, level: int, box: Box) -> NDArray[Any]:
    """Compute ``box`` of a level from the level above it, and write it. Returns its voxels."""
    values = coarsen(open_array(str(image), level - 1), box)
    finish(write_units(open_array(str(image), level, "w"), box, values))
    return values


def read_block(image: Path, level: int, box: Box) -> NDArray[Any]:
    """[c, z, y, x] as stored; what was never written is 0. Raises InputError where it is damaged."""
    z, y, x = box.slices()
    try:
        values: NDArray[Any] = open_array(str(image), level, cache_bytes=0)[:, z, y, x].read().result()
    except ValueError as error:
        raise InputError(f"{image}/{level} is damaged: {reason(error)}") from error
    return values
