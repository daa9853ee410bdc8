"""Lower-resolution levels of the output, built block by block once the level above is complete.

Convention: level k halves level k - 1 along z, y and x; a block of a level is one shard of it, computed from the 2 x
2 x 2 times larger box above. Levels have ledgers of their own, so a killed run continues inside the pyramid too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emdiffuse_vol.executors.walltime import check_time
from emdiffuse_vol.geometry.boxes import Box, Triple, cell_box, grid_shape
from emdiffuse_vol.reconstruct.ledger import Receipt, checksum
from emdiffuse_vol.stores.blocks import build_block


@dataclass(frozen=True)
class LevelTask:
    image: str
    level: int
    shape: Triple
    shard: Triple
    expected: float = 0.0

    @property
    def grid(self) -> Triple:
        return grid_shape(self.shape, self.shard)

    def box(self, index: int) -> Box:
        """Voxels of the level that a block makes."""
        z, y, x = (int(i) for i in np.unravel_index(index, self.grid))
        return cell_box((z, y, x), self.shard) & Box.of(self.shape)

    def __call__(self, index: int) -> Receipt:
        check_time(self.expected)
        started = time.perf_counter()
        values = build_block(Path(self.image), self.level, self.box(index))
        return Receipt(index, time.perf_counter() - started, checksum=checksum(values))
