"""When to strike: at a time, or after so many changes of the files of a stage."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LEVELS = 2  # above the first


@dataclass(frozen=True)
class Moment:
    """``delay`` seconds after the ``count``-th change of the files of an event; of "time": after the start, of
    "worker": after the first process of a dask worker is there."""

    event: str
    count: int
    delay: float

    def __str__(self) -> str:
        after = f"{self.event} {self.count} + " if self.count else ""
        return f"{after}{self.delay * 1000:.0f} ms"


# event -> how many changes of its files an unbroken run makes, about
EVENTS = {"time": 0, "creating": 50, "shard": 25, "ledger": 60, "pyramid": 20, "sealing": 6}
STARTING = 4.0  # seconds that a worker takes to start
LATER = ("time", "shard", "ledger", "pyramid", "sealing")


def choose_moment(
    dice: random.Random, seconds: float, events: tuple[str, ...] = tuple(EVENTS), seen: float = 1.0
) -> Moment:
    """seen: share of the changes that can be seen; in memory, many files come and go between two looks."""
    event = dice.choice(events)
    if event == "time":
        return Moment(event, 0, dice.uniform(0.02, 1.0) * seconds)
    if event == "worker":
        return Moment(event, 1, dice.uniform(0, STARTING))
    count = 1 + int(EVENTS[event] * seen * dice.random() ** 1.5)  # later starts have less left to do
    return Moment(event, count, dice.choice((0.0, dice.uniform(0, 0.01), dice.uniform(0, 0.1))))


class Watch:
    """Counts changes: files that appear, grow, are replaced or go, while one looks."""

    def __init__(self, out: Path, event: str) -> None:
        self.out, self.event = out, event
        self.seen, self.changes = self._look(), 0

    def look(self) -> int:
        seen = self._look()
        self.changes += len(set(seen.items()) ^ set(self.seen.items()))
        self.seen = seen
        return self.changes

    def _look(self) -> dict[str, tuple[int, int, int]]:
        return {e.path: _signature(e) for place in self._places() for e in files_below(place)}

    def _places(self) -> list[str]:
        out = str(self.out)
        match self.event:
            case "creating":
                return [str(p) for p in self.out.parent.glob(f".{self.out.name}.*")]
            case "shard":
                return [f"{out}/0/c"]
            case "ledger":
                return [f"{out}/ledger/{name}" for name in ("state", "p99", "level1/state")]
            case "pyramid":
                return [f"{out}/{level}/c" for level in range(1, LEVELS + 1)]
            case "sealing":
                last = f"{out}/ledger/level{LEVELS}/state/c"
                return [last, f"{out}/zarr.json", f"{out}/zarr.json.__lock"] if os.path.exists(last) else []
        return []


def files_below(place: str) -> Iterator[os.DirEntry[str]]:
    try:
        entries = list(os.scandir(place))
    except NotADirectoryError:
        folder, _, name = place.rpartition("/")
        yield from (e for e in _scan(folder) if e.name == name)
        return
    except OSError:  # not there, or not any more
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(entry.path)
        else:
            yield entry


def _scan(folder: str) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError:
        return []


def _signature(entry: os.DirEntry[str]) -> tuple[int, int, int]:
    try:
        found = entry.stat(follow_symlinks=False)
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size
