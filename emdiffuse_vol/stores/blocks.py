"""Whole shards of an output image, written by exactly one process each.

Convention: an image is a group with arrays "0" (full resolution), "1", ... of axes c z y x. ``write_shards`` is given
boxes whose shards nobody else writes, and returns when the bytes are on disk (tensorstore: file, fsync, rename, fsync
of the folder). A killed writer leaves an old shard, a new one or none, never a torn one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorstore as ts
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.ome_zarr import downsample, open_array


def open_level(image: Path, level: int, write: bool = True) -> ts.TensorStore:
    return open_array(str(image), level, "w" if write else "r")


def write_shards(array: ts.TensorStore, box: Box, values: NDArray[Any]) -> None:
    """values: [c, z, y, x] for ``box`` of the array. One transaction, so each shard is written once, whole."""
    with ts.Transaction() as transaction:
        array.with_transaction(transaction)[(slice(None), *box.slices())].write(values).result()


def build_shards(image: Path, level: int, box: Box) -> None:
    """Write a box of a pyramid level from the level above it."""
    finer = open_level(image, level - 1, write=False)
    source = Box(tuple(2 * a for a in box.start), tuple(2 * b for b in box.stop))  # type: ignore[arg-type]
    source &= Box.of(tuple(finer.shape[1:]))
    values = finer[(slice(None), *source.slices())].read().result()
    write_shards(open_level(image, level), box, downsample(values))
