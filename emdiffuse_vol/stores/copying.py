"""Any volume into a target, whatever the format: in bands, by a few threads, and from where a kill has stopped it.

Convention: a target has levels, the full one first; a level is written in whole *units*, each once, a band of
neighbouring ones at a time. Memory is bounded by ``BAND_BYTES`` and a few units, whatever the volume's size. What is
done is recorded band by band, in their order, in a file inside the unfinished target: its *journal*.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Box, Triple, cell_box, cells_meeting, grid_shape
from emdiffuse_vol.stores.image import coarsen, finish
from emdiffuse_vol.stores.volume import Volume

# Read at once, by all threads together, where chunks are wider than units, as strips of a TIFF, which span the width
# and are decoded whole: neighbouring units along x. Elsewhere a band is one unit.
BAND_BYTES = 256 << 20
WORKERS = min(4, os.cpu_count() or 1)

Read = Callable[[Box], NDArray[Any]]
Write = Callable[[Box, NDArray[Any]], "ts.Future[None] | None"]


class Target(Protocol):
    """Where voxels go. Units of a level may be written by several threads at once."""

    @property
    def shapes(self) -> list[Triple]:
        """Of the levels."""
        ...

    def unit(self, level: int) -> Triple: ...

    def writer(self, level: int) -> Write:
        """Writes whole units; they are on disk when what it returns is finished."""
        ...

    def reader(self, level: int) -> ts.TensorStore:
        """[z, y, x] of a level that is written, for the next coarser one."""
        ...

    def close(self) -> None: ...


@dataclass
class Journal:
    """bands: number of bands done, of each level. key: tells one copy from another."""

    path: Path | None
    key: str
    bands: list[int]

    @staticmethod
    def open(folder: Path, key: str) -> Journal:
        """Of an unfinished target. What is another copy's, or does not say what it is, is removed."""
        path = folder / ".emdvol-copy.json"
        try:
            found = json.loads(path.read_text())
            if found["key"] == key:
                return Journal(path, key, [int(n) for n in found["bands"]])
        except (OSError, ValueError, LookupError, TypeError):
            pass
        remove(folder)
        return Journal(path, key, [])

    @property
    def begun(self) -> bool:
        return bool(self.bands)

    def begin(self, levels: int) -> None:
        """The target is created; nothing is in it."""
        if not self.begun:
            self.bands = [0] * levels
            self._write()

    def done(self, level: int) -> None:
        self.bands[level] += 1
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps({"key": self.key, "bands": self.bands}))
        beside.replace(self.path)

    def end(self) -> None:
        if self.path is not None:
            self.path.unlink()


def fill(volume: Volume, target: Target, journal: Journal, progress: Callable[[int, int], None]) -> None:
    """progress: called with units done and in all. Raises InputError, OutputError."""
    shapes, itemsize = target.shapes, np.dtype(volume.spec.dtype).itemsize
    total, done = sum(prod(grid_shape(shape, target.unit(k))) for k, shape in enumerate(shapes)), 0
    progress(0, total)
    for level, shape in enumerate(shapes):
        unit = target.unit(level)
        read = volume.read if level == 0 else partial(coarsen, target.reader(level - 1))
        # Means need no wide bands: every finer voxel is read once, in whole chunks.
        wide = level == 0 and (volume.spec.chunk is None or volume.spec.chunk[2] > unit[2])
        bands = partial(_bands, shape, unit, BAND_BYTES // WORKERS // itemsize if wide else 0)
        for band in islice(bands(), journal.bands[level]):
            done += prod(grid_shape(band.shape, unit))
        for cells in _copied(islice(bands(), journal.bands[level], None), unit, read, target.writer(level)):
            journal.done(level)
            for _ in range(cells):
                done += 1
                progress(done, total)


def _bands(shape: Triple, unit: Triple, voxels: int) -> Iterator[Box]:
    """Boxes of whole units in a row, of about so many voxels."""
    width = max(1, voxels // prod(unit)) * unit[2]
    whole = Box.of(shape)
    for index in cells_meeting(whole, (unit[0], unit[1], width)):
        yield cell_box(index, (unit[0], unit[1], width)) & whole


def _copied(bands: Iterator[Box], unit: Triple, read: Read, write: Write) -> Iterator[int]:
    """Copies bands, WORKERS at a time; yields the number of units of each, in their order, once it is on disk."""
    with ThreadPoolExecutor(WORKERS) as pool:
        pending: deque[Future[int]] = deque()
        try:
            for band in bands:
                if len(pending) == WORKERS:
                    yield pending.popleft().result()
                pending.append(pool.submit(_copy_band, band, unit, read, write))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _copy_band(band: Box, unit: Triple, read: Read, write: Write) -> int:
    greys = read(band)
    futures = []
    for cell in cells_meeting(band, unit):
        box = cell_box(cell, unit) & band
        futures.append(write(box, greys[box.slices(band.start)]))
    for future in futures:
        finish(future)
    return len(futures)


def remove(path: Path) -> None:
    """A file or a folder, whether or not it is there; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
