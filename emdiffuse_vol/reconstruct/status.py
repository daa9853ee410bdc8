"""How far a run is, from its ledger alone: while it runs, after a crash, or when it is done.

Convention: nothing is written and no driver is asked; what drivers say of themselves is in ``ledger/drivers``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import ceil_div, grid_shape
from emdiffuse_vol.reconstruct.engine import stages
from emdiffuse_vol.reconstruct.ledger import FAILED, FINISHED, PENDING, SKIPPED, STATES, Ledger
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.presence import Presence, drivers


@dataclass(frozen=True)
class StageStatus:
    """counts: blocks in each of ledger.STATES."""

    name: str
    counts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def finished(self) -> int:
        return sum(self.counts[STATES[state]] for state in FINISHED)


@dataclass(frozen=True)
class Status:
    """voxels: of the output; rate: voxels per second of all live drivers lately; block_map: see :func:`block_map`."""

    path: str
    sealed: bool
    stages: list[StageStatus]
    drivers: list[Presence]
    failed: list[int]
    tries: int
    block_seconds: float
    voxels: int
    block_map: NDArray[np.float32]

    @property
    def rate(self) -> float:
        return sum(driver.rate for driver in self.drivers if driver.live)

    @property
    def seconds_left(self) -> float | None:
        """Of the blocks, at the rate of now; None where nothing moves."""
        blocks = self.stages[0]
        left = self.voxels * (1 - blocks.finished / blocks.total)
        return left / self.rate if self.rate > 0 else None

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "sealed": self.sealed,
            "stages": {stage.name: stage.counts for stage in self.stages},
            "drivers": [{**vars(driver), "live": driver.live} for driver in self.drivers],
            "failed": self.failed,
            "failed_tries": self.tries,
            "block_seconds": self.block_seconds,
            "voxels": self.voxels,
            "voxels_per_second": self.rate,
            "seconds_left": self.seconds_left,
            "time": time.time(),
        }


def read_status(path: Path) -> Status:
    """Raises OutputError where there is no output of ours, or its ledger is damaged."""
    output = Output(path)
    found, job = [], output.job()
    blocks = None
    for stage in stages(output, job, permits=1, threads=None):
        ledger = Ledger(path, stage.ledger, stage.grid)
        counts = np.bincount(ledger.state.ravel(), minlength=len(STATES))
        found.append(StageStatus(stage.name, dict(zip(STATES, map(int, counts), strict=True))))
        blocks = blocks or ledger
    assert blocks is not None
    seconds = blocks.read("seconds")[np.isin(blocks.state, FINISHED)]
    return Status(
        path=str(path),
        sealed=output.sealed,
        stages=found,
        drivers=drivers(path),
        failed=blocks.numbers(FAILED),
        tries=int(blocks.read("tries").sum(dtype=np.int64)),
        block_seconds=float(seconds.mean()) if seconds.size else 0.0,
        voxels=prod(output.attributes["geometry"]["shape"]),
        block_map=block_map(blocks.state),
    )


def block_map(state: NDArray[np.uint8], height: int = 20, width: int = 60) -> NDArray[np.float32]:
    """[y, x] of the blocks' grid seen along z, at most ``height`` x ``width`` cells: the share of blocks that is
    finished; -1 where one has failed; NaN where all were skipped."""
    rows, columns = (max(1, ceil_div(n, most)) for n, most in zip(state.shape[1:], (height, width), strict=True))
    _, high, wide = grid_shape((1, state.shape[1], state.shape[2]), (1, rows, columns))
    cells = np.full((high, wide), np.nan, np.float32)
    for y, x in np.ndindex(high, wide):
        cell = state[:, y * rows : (y + 1) * rows, x * columns : (x + 1) * columns]
        if (cell == FAILED).any():
            cells[y, x] = -1
        elif not (cell == SKIPPED).all():
            cells[y, x] = 1 - np.mean(cell == PENDING)
    return cells
