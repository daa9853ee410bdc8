"""Which blocks are done, kept as small Zarr arrays inside the output: one element per block, on the grid of blocks.

Convention: ``ledger/state`` is 0 pending, 1 done; ``p99`` and ``mean`` are of the block's uncertainty in greys,
``seconds`` is what it took. Only the driver writes. A block is recorded after its bytes are on disk: statistics
first, its state last. The arrays are also the block-level map of reliability that people plot. Pyramid levels have a
``state`` of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emdiffuse_vol.geometry.boxes import Triple
from emdiffuse_vol.stores.small_arrays import create_array, open_small, write_elements

PENDING, DONE = 0, 1
FIELDS = {"p99": "float32", "mean": "float32", "seconds": "float32"}


@dataclass(frozen=True)
class Receipt:
    """What a finished block tells the driver. Statistics are NaN for pyramid blocks."""

    index: int
    seconds: float
    p99: float = float("nan")
    mean: float = float("nan")


class Ledger:
    """name: "" for the blocks of the run, "level1", ... for the pyramid."""

    def __init__(self, output: Path, name: str, grid: Triple) -> None:
        folder = output / "ledger" / name if name else output / "ledger"
        self.grid = grid
        self._arrays = {field: open_small(folder / field) for field in (("state", *FIELDS) if not name else ("state",))}
        self.state = np.asarray(self._arrays["state"].read().result()).ravel()

    @staticmethod
    def create(output: Path, name: str, grid: Triple) -> None:
        folder = output / "ledger" / name if name else output / "ledger"
        create_array(folder / "state", grid, "uint8")
        if not name:
            for field, dtype in FIELDS.items():
                create_array(folder / field, grid, dtype)

    def pending(self) -> Iterator[int]:
        """Numbers of the blocks still to do, lazily."""
        return (int(n) for n in np.flatnonzero(self.state != DONE))

    @property
    def done(self) -> int:
        return int(np.count_nonzero(self.state == DONE))

    def record(self, receipt: Receipt) -> None:
        place: Any = np.unravel_index(receipt.index, self.grid)
        statistics = {field: getattr(receipt, field) for field in self._arrays if field != "state"}
        write_elements({self._arrays[field]: value for field, value in statistics.items()}, place)
        write_elements({self._arrays["state"]: DONE}, place)
        self.state[receipt.index] = DONE
