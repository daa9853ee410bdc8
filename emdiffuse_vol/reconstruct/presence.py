"""Who is working on an output: a small file for each driver, inside its ledger.

Convention: ``ledger/drivers/HOST-PID.json``, replaced every few seconds while the driver lives and removed when it
ends; what a killed one leaves goes silent, and is removed by a later driver. Drivers do not exclude each other: the
file tells people what is going on, and another driver where not to begin.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

EVERY = 2.0  # seconds between updates
SILENT = 30.0  # seconds after which a driver is not believed to live
RECENT = 120.0  # seconds over which throughput is measured


@dataclass
class Presence:
    """voxels: of the output, done by this driver; rate: voxels per second lately; stage: "blocks", "level 1", ..."""

    host: str
    pid: int
    executor: str
    share: str
    link: str | None = None
    started: float = field(default_factory=time.time)
    updated: float = 0.0
    stage: str = "blocks"
    workers: int = 0
    in_flight: int = 0
    done: int = 0
    retried: int = 0
    voxels: int = 0
    rate: float = 0.0

    @property
    def live(self) -> bool:
        return time.time() < self.updated + SILENT and not self._killed

    @property
    def _killed(self) -> bool:
        """Known of drivers on this machine only."""
        if self.host != platform.node():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # it is somebody else's
            return False
        return False


class Announcer:
    """Keeps a driver's file up to date."""

    def __init__(self, folder: Path, presence: Presence) -> None:
        self.path = folder / f"{presence.host}-{presence.pid}.json"
        self.presence = presence
        self._marks = [(time.time(), 0)]  # (when, voxels)

    def update(self, force: bool = False) -> None:
        now, here = time.time(), self.presence
        if not force and now < here.updated + EVERY:
            return
        self._marks.append((now, here.voxels))
        while len(self._marks) > 2 and self._marks[1][0] < now - RECENT:
            self._marks.pop(0)
        (then, before), here.updated = self._marks[0], now
        here.rate = (here.voxels - before) / max(now - then, 1e-9)
        with suppress(OSError):  # nothing depends on it
            fresh = self.path.with_suffix(".new")
            fresh.write_text(json.dumps(asdict(here)))
            fresh.rename(self.path)


@contextmanager
def announced(output: Path, executor: str, share: str, link: str | None) -> Iterator[Announcer]:
    folder = output / "ledger" / "drivers"
    announcer = Announcer(folder, Presence(platform.node(), os.getpid(), executor, share, link))
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        for path, driver in _files(output):
            if not driver.live:
                path.unlink(missing_ok=True)
                path.with_suffix(".new").unlink(missing_ok=True)
    announcer.update(force=True)
    try:
        yield announcer
    finally:
        with suppress(OSError):
            announcer.path.unlink(missing_ok=True)


def drivers(output: Path) -> list[Presence]:
    """All that have not said goodbye; ``live`` says which are believed."""
    return [driver for _, driver in _files(output)]


def _files(output: Path) -> Iterator[tuple[Path, Presence]]:
    for path in sorted((output / "ledger" / "drivers").glob("*.json")):
        with suppress(OSError, ValueError, TypeError):  # gone or half-written by now
            yield path, Presence(**json.loads(path.read_text()))
