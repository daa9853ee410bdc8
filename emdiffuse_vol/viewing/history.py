"""What became of the blocks of a run: their reliability as a map, what failed and why, and how fast it went.

Convention: from the ledger and from ``events.jsonl``, whose lines are looked at one by one; a run of a million blocks
gives no more to hold than one of ten. Times are seconds since 1970.
"""

from __future__ import annotations

import json
from calendar import timegm
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import strptime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import ceil_div
from emdiffuse_vol.reconstruct.ledger import BRIDGED, DONE, FAILED, PENDING

MADE, UNMADE, OUTSIDE, BROKEN = range(4)  # what a cell of a map shows
MOST_CELLS = 128
MOST_ERRORS = 1000


@dataclass(frozen=True)
class BlockMap:
    """Blocks seen along an axis. worst: the largest p99 in each cell, NaN where nothing is made; kind: of MADE, ...;
    step: blocks across a cell, along rows and columns."""

    worst: NDArray[np.float32]
    kind: NDArray[np.uint8]
    step: tuple[int, int]


def project(state: NDArray[np.uint8], p99: NDArray[np.floating[Any]], axis: int, most: int = MOST_CELLS) -> BlockMap:
    """state, p99: on the grid of blocks [z, y, x]. A cell where any block has failed is BROKEN, one where any is made
    is MADE, one where any is to be made UNMADE; the others are OUTSIDE tissue."""
    made = np.isin(state, (DONE, BRIDGED))
    steps: list[int] = []

    def most_of(values: NDArray[Any]) -> NDArray[Any]:
        flat: NDArray[Any] = values.max(axis=axis)
        steps[:] = [ceil_div(n, most) for n in flat.shape]
        for i, step in enumerate(steps):
            flat = np.maximum.reduceat(flat, np.arange(0, flat.shape[i], step), axis=i)
        return flat

    worst = most_of(np.where(made, p99, np.float32(-1)))
    kind = np.full(worst.shape, OUTSIDE, np.uint8)
    kind[most_of(state == PENDING)] = UNMADE
    kind[worst >= 0] = MADE
    kind[most_of(state == FAILED)] = BROKEN
    return BlockMap(np.where(worst >= 0, worst, np.nan).astype(np.float32), kind, (steps[0], steps[1]))


@dataclass(frozen=True)
class Stretch:
    """Blocks made by one driver from ``start`` to ``stop``."""

    start: float
    stop: float
    voxels: int
    host: str


@dataclass
class History:
    """counts: lines of each event. stretches: of drivers that came to their end; what killed ones did is not known.
    errors: block -> what was said of it last."""

    counts: dict[str, int] = field(default_factory=dict)
    stretches: list[Stretch] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    first: float | None = None
    last: float | None = None

    @property
    def voxels(self) -> int:
        return sum(stretch.voxels for stretch in self.stretches)

    @property
    def seconds(self) -> float:
        """In which at least one driver was at work."""
        total, reached = 0.0, 0.0
        for stretch in sorted(self.stretches, key=lambda s: s.start):
            total += max(0.0, stretch.stop - max(stretch.start, reached))
            reached = max(reached, stretch.stop)
        return total

    def rates(self, bins: int = 120) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Edges of ``bins`` equal spans of time, and voxels per second of all drivers in each."""
        start = min((s.start for s in self.stretches), default=0.0)
        stop = max((s.stop for s in self.stretches), default=1.0)
        edges = np.linspace(start, max(stop, start + 1e-3), bins + 1)
        rates = np.zeros(bins)
        for s in self.stretches:
            overlap = np.minimum(edges[1:], s.stop) - np.maximum(edges[:-1], s.start)
            rates += overlap.clip(0) / np.diff(edges) * s.voxels / max(s.stop - s.start, 1e-9)
        return edges, rates


def paced(
    times: NDArray[np.float64], start: float, voxels: float, most: int = 80
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """times: when some of the blocks were made, which stand for all ``voxels``. Edges of equal spans of time from
    ``start``, and voxels per second in each."""
    edges = np.linspace(start, max(times.max(), start + 1e-3), max(4, min(most, len(times) // 5)) + 1)
    counts, _ = np.histogram(times.clip(start), edges)
    return edges, counts / len(times) * voxels / np.diff(edges)


def read_history(output: Path) -> History:
    """Lines that make no sense are passed over: a killed driver may leave one."""
    found = History()
    for event in _lines(output / "events.jsonl"):
        with suppress(KeyError, TypeError, ValueError):
            _note(found, event)
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with suppress(OSError), path.open(errors="replace") as log:
        for line in log:
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event


def _note(found: History, event: dict[str, Any]) -> None:
    name, moment = str(event["event"]), float(timegm(strptime(event["time"], "%Y-%m-%dT%H:%M:%SZ")))
    found.counts[name] = found.counts.get(name, 0) + 1
    found.first = moment if found.first is None else min(found.first, moment)
    found.last = moment if found.last is None else max(found.last, moment)
    if name == "failed" and (len(found.errors) < MOST_ERRORS or event["block"] in found.errors):
        found.errors[int(event["block"])] = str(event.get("error", ""))
    elif name == "stage" and event["stage"] == "blocks" and event["voxels"]:
        seconds = float(event["seconds"])
        found.stretches.append(Stretch(moment - seconds, moment, int(event["voxels"]), str(event.get("host", ""))))
