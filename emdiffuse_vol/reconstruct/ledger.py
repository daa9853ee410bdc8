"""What is known of every block: small Zarr arrays inside the output, one element per block, on the grid of blocks.

Convention: ``ledger/state`` holds one of the states below; ``tries`` counts attempts that failed, ``checksum`` is the
CRC-32C of the block's voxels, ``p99`` and ``mean`` are of its uncertainty in greys, ``seconds`` is what it took. They
are also the block-level map of reliability that people plot. Pyramid levels have a ledger of their own.

A block is recorded after its bytes are on disk: first what is known of it, its state last. Arrays are cut into
*regions*, cubes of blocks, each a file. A driver takes blocks region by region, and a share i/N of a run is a range
of regions, so processes that divide a run write different files. Two that do not divide it are safe too: elements
are changed one by one, and blocks come out the same whoever makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Box, Triple, cell_box, grid_shape
from emdiffuse_vol.stores.small_arrays import create_array, edge_of, open_small, read_part, write_elements

# SKIPPED: outside tissue; BRIDGED: done, and planes of it lie where sections are damaged; FAILED: set aside.
PENDING, DONE, SKIPPED, BRIDGED, FAILED = range(5)
STATES = ("pending", "done", "skipped", "bridged", "failed")
FINISHED = (DONE, SKIPPED, BRIDGED)

LEVEL_FIELDS = {"tries": "uint8", "checksum": "uint32", "seconds": "float32"}
FIELDS = {**LEVEL_FIELDS, "p99": "float32", "mean": "float32"}
MOST_REGIONS = 4096

Share = tuple[int, int]  # (i, N): part i of N
ALL: Share = (0, 1)


@dataclass(frozen=True)
class Receipt:
    """What a block that has ended tells the driver. ``read_bytes``: of the input, from where it lies, by the process
    since its last receipt; ``batch``: tiles that the network takes at once, where that had to be lowered."""

    index: int
    seconds: float = 0.0
    state: int = DONE
    p99: float = 0.0
    mean: float = 0.0
    checksum: int = 0
    tries: int = 0
    read_bytes: int = 0
    batch: int | None = None


def checksum(values: NDArray[Any]) -> int:
    """CRC-32C of voxels in C order. Processors have an instruction for it, so it is nearly free."""
    return int(google_crc32c.value(np.ascontiguousarray(values)))


class Ledger:
    """name: "" for the blocks of the run, "level1", ... for the pyramid. Raises OutputError where it is damaged."""

    def __init__(self, output: Path, name: str, grid: Triple) -> None:
        folder = output / "ledger" / name
        self.name, self.grid = name, grid
        self._state = open_small(folder / "state")
        self._fields = {field: open_small(folder / field) for field in (LEVEL_FIELDS if name else FIELDS)}
        self._edge = edge_of(self._state)
        self.state: NDArray[np.uint8] = read_part(self._state)

    @staticmethod
    def create(output: Path, name: str, grid: Triple) -> None:
        folder, edge = output / "ledger" / name, region_edge(grid)
        create_array(folder / "state", grid, "uint8", edge)
        for field, dtype in (LEVEL_FIELDS if name else FIELDS).items():
            create_array(folder / field, grid, dtype, edge)

    @property
    def _regions(self) -> Triple:
        return grid_shape(self.grid, (self._edge,) * 3)

    def __len__(self) -> int:
        return prod(self.grid)

    def read(self, field: str) -> NDArray[Any]:
        """One of FIELDS, on the grid of blocks."""
        return read_part(self._fields[field])

    def refresh(self) -> None:
        """See what other processes have recorded."""
        self.state = read_part(self._state)

    @property
    def finished(self) -> int:
        return int(np.isin(self.state, FINISHED).sum())

    @property
    def complete(self) -> bool:
        return self.finished == len(self)

    def numbers(self, state: int) -> list[int]:
        """Blocks in a state; for states that few are in."""
        return [int(n) for n in np.flatnonzero(self.state.ravel() == state)]

    def finished_in(self, box: Box) -> bool:
        """Whether all blocks in a box of the grid are, as far as this process has seen."""
        return bool(np.isin(self.state[box.slices()], FINISHED).all())

    def finished_by_now(self, index: int) -> bool:
        """Whether a block is, whoever has recorded it."""
        z, y, x = np.unravel_index(index, self.grid)
        return int(read_part(self._state, (int(z), int(y), int(x)))) in FINISHED

    def shares(self, index: int, share: Share) -> bool:
        """Whether a block belongs to a share."""
        place = np.unravel_index(index, self.grid)
        region = int(np.ravel_multi_index([int(i) // self._edge for i in place], self._regions))
        return region in self._range(share)

    def take(self, share: Share = ALL, ready: Callable[[int], bool] | None = None, start: float = 0.0) -> Iterator[int]:
        """Numbers of the pending blocks, region by region, lazily; z runs fastest, so that neighbours in z, which share
        input chunks, follow each other. Each region is looked at again when its turn comes.

        ready: which blocks to take, if not all. start: where in the share to begin, from 0 to 1.
        """
        mine = self._range(share)
        middle = mine.start + int(len(mine) * start)
        for number in (*range(middle, mine.stop), *range(mine.start, middle)):
            corner = tuple(int(i) for i in np.unravel_index(number, self._regions))
            region = cell_box((corner[0], corner[1], corner[2]), (self._edge,) * 3) & Box.of(self.grid)
            state = self.state[region.slices()] = read_part(self._state, region.slices())
            for y, x, z in np.argwhere((state == PENDING).transpose(1, 2, 0)) + np.array(region.start)[[1, 2, 0]]:
                index = int(np.ravel_multi_index((z, y, x), self.grid))
                if ready is None or ready(index):
                    yield index

    def _range(self, share: Share) -> range:
        """Numbers of the regions of a share."""
        part, parts = share
        total = prod(self._regions)
        return range(total * part // parts, total * (part + 1) // parts)

    def record(self, receipts: Sequence[Receipt]) -> None:
        """Durable when it returns."""
        if not receipts:
            return
        places = np.unravel_index(np.array([receipt.index for receipt in receipts]), self.grid)
        values = {
            field: np.array([getattr(receipt, field) for receipt in receipts], FIELDS[field]) for field in self._fields
        }
        states = np.array([receipt.state for receipt in receipts], np.uint8)
        write_elements(self._fields, places, values)
        write_elements({"state": self._state}, places, {"state": states})
        self.state[places] = states

    def forget(self, indices: Sequence[int]) -> None:
        """Blocks that are to be made again."""
        self.record([Receipt(index, state=PENDING) for index in indices])


def region_edge(grid: Triple) -> int:
    """Smallest power of two for which there are at most MOST_REGIONS regions: as many files of each array."""
    edge = 1
    while prod(grid_shape(grid, (edge,) * 3)) > MOST_REGIONS:
        edge *= 2
    return edge
