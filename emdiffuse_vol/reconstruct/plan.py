"""Which blocks a run consists of, and what each needs. Lazy: a block is computed from its number.

Convention: all boxes are in voxels of the whole output (or, for ``read``, of the whole input), also when only a
region is made; ``region.start`` is where the stored array begins. A block has three boxes:

    write     what it owns: whole shards of the stored array, cut at the region's end; they partition the region
    predict   the tiles that contribute to it, halos included
    read      the input those tiles depend on, along z in good sections; what lies outside them is mirrored
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import groupby
from math import prod

import numpy as np

from emdiffuse_vol.errors import GeometryError
from emdiffuse_vol.geometry.boxes import Box, Triple, ceil_div, cell_box, grid_shape
from emdiffuse_vol.geometry.tiles import Tiling
from emdiffuse_vol.modes.mode import Mode

CHUNK: Triple = (64, 64, 64)
SMALLEST_SHARD: Triple = (64, 256, 256)
DOUBLINGS = 2  # the largest default shard is 256 x 1024 x 1024: a process holds a few, however large the volume
MOST_SHARDS = 1 << 20


@dataclass(frozen=True)
class Block:
    index: int
    write: Box
    predict: Box
    read: Box


@dataclass(frozen=True)
class Plan:
    mode: Mode
    region: Box
    tiling: Tiling
    block: Triple
    shard: Triple
    chunk: Triple

    @cached_property
    def grid(self) -> Triple:
        """Blocks along each axis."""
        return grid_shape(self.region.shape, self.block)

    @property
    def offset(self) -> Triple:
        """Shift from output voxels to indices of the stored array."""
        z, y, x = self.region.start
        return -z, -y, -x

    def __len__(self) -> int:
        return prod(self.grid)

    def __getitem__(self, index: int) -> Block:
        write = self.write_box(index)
        predict = reduce(Box.__or__, (self.tiling.input_box(tile) for tile in self.tiling.tiles_for(write)))
        return Block(index, write, predict, self.mode.read_box(predict))

    def write_box(self, index: int) -> Box:
        _, height, width = self.grid
        cell = cell_box((index // (height * width), index // width % height, index % width), self.block)
        return cell.shift(self.region.start) & self.region

    def pieces(self, write: Box) -> Iterator[tuple[Box, list[Triple]]]:
        """Parts of a block that can be finished one by one, each with the tiles that contribute to it.

        Where tiles are exact a piece is one tile's cell; where they are blended, all cells of one height.
        """
        height = self.tiling.core[0]
        for k, tiles in groupby(self.tiling.tiles_for(write), key=lambda tile: tile[0]):
            if self.tiling.blend:
                layer = Box((k * height, *write.start[1:]), ((k + 1) * height, *write.stop[1:]))
                yield layer & write, list(tiles)
            else:
                yield from ((cell_box(tile, self.tiling.core) & write, [tile]) for tile in tiles)

    def bridged(self, block: Block) -> bool:
        """Whether a block owns planes that lie where sections are damaged."""
        planes = np.arange(block.write.start[0], block.write.stop[0])
        return bool(self.mode.axial.bridged(planes).any())


def default_shard(shape: Triple) -> Triple:
    """About 8 MB, doubled once or twice where there would be over a million; no larger than a small volume needs."""
    z, y, x = SMALLEST_SHARD
    for _ in range(DOUBLINGS):
        if prod(grid_shape(shape, (z, y, x))) > MOST_SHARDS:
            z, y, x = 2 * z, 2 * y, 2 * x
    needed = tuple(ceil_div(n, c) * c for n, c in zip(shape, CHUNK, strict=True))
    return min(z, needed[0]), min(y, needed[1]), min(x, needed[2])


def plan_blocks(
    mode: Mode, region: Box, tiling: Tiling, block: Triple | None = None, shard: Triple | None = None
) -> Plan:
    """Raises GeometryError where shards are not whole chunks, or blocks not whole shards."""
    shard = shard or default_shard(region.shape)
    if any(s < 1 or s % c for s, c in zip(shard, CHUNK, strict=True)):
        raise GeometryError(
            f"shard {_text(shard)} is not a multiple of the chunk {_text(CHUNK)}; "
            f"use --shard {_text(_round_up(shard, CHUNK))}"
        )
    # A tile larger than a shard would be computed again for each of them.
    block = block or _holding(shard, tiling.core)
    if any(b < 1 or b % s for b, s in zip(block, shard, strict=True)):
        raise GeometryError(
            f"block {_text(block)} is not a multiple of the shard {_text(shard)}; "
            f"use --block {_text(_round_up(block, shard))}"
        )
    return Plan(mode, region, tiling, block, shard, CHUNK)


def _holding(shard: Triple, tile: Triple) -> Triple:
    """Whole shards that hold whole tiles, along axes on which a tile is made of whole shards."""
    z, y, x = (t if t % s == 0 else s for s, t in zip(shard, tile, strict=True))
    return z, y, x


def _round_up(size: Triple, cell: Triple) -> Triple:
    z, y, x = (max(1, ceil_div(s, c)) * c for s, c in zip(size, cell, strict=True))
    return z, y, x


def _text(size: Triple) -> str:
    return ",".join(map(str, size))
