"""One output, struck and continued, and the verdict on it."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from emdiffuse_vol.errors import EmdvolError
from striking.bench import TOOL, Bench
from striking.moments import EVENTS, Moment, Watch, choose_moment
from striking.outputs import State, cannot_open, file_hashes, look_at
from striking.processes import LIMIT, Failed, Process, dask_workers

LEAVING = 60.0  # seconds that what a killed process has started may outlive it
BALLAST = "ballast"  # a file that fills a disk
POLL, IDLE = 0.0004, 0.005  # seconds between looks at the files, once there are any and before


@dataclass
class Trial:
    """One output, what was done to it, and what was found."""

    bench: Bench
    kind: str
    seed: int
    folder: Path
    strikes: list[dict[str, Any]] = field(default_factory=list)
    reruns: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    started: list[Process] = field(default_factory=list)
    judged: bool = False

    @cached_property
    def dice(self) -> random.Random:
        return random.Random(f"{self.kind} {self.seed}")

    @property
    def out(self) -> Path:
        return self.folder / "place" / "out.zarr"

    def command(self, *flags: str, tool: tuple[str, ...] = TOOL) -> list[str]:
        return self.bench.command(self.out, *flags, tool=tool)

    def moment(self, *events: str) -> Moment:
        return choose_moment(self.dice, self.bench.seconds, events or tuple(EVENTS))

    def start(self, command: list[str], name: str = "driver") -> Process:
        process = Process(command, self.folder, f"{name}{len(self.started)}")
        self.started.append(process)
        return process

    def reached(self, process: Process, moment: Moment) -> bool:
        """Wait for a moment. False where the process ended before."""
        watch, deadline = Watch(self.out, moment.event), time.monotonic() + LIMIT
        while not dask_workers(process) if moment.event == "worker" else watch.look() < moment.count:
            if process.status is not None:
                return False
            if time.monotonic() > deadline:
                raise Failed(f"{process.name} hung: {moment} did not come; {process.said()}")
            time.sleep(POLL if watch.seen else IDLE)
        time.sleep(moment.delay)
        return process.status is None

    def struck(self, what: str, moment: Moment, process: Process) -> None:
        """Note a strike; whatever is recorded must be on disk."""
        at = time.monotonic() - process.started
        state = self.inspect()
        self.strikes.append({"what": what, "moment": str(moment), "seconds": round(at, 3), "state": state.stage})

    def inspect(self) -> State:
        try:
            state = look_at(self.out)
        except EmdvolError as error:
            raise Failed(f"the output cannot be read after a strike: {error}") from error
        if state.wrong:
            self.problems.append(f"recorded and not on disk: {', '.join(state.wrong)}")
        return state

    def kill_at(self, command: list[str], moment: Moment, name: str = "driver") -> bool:
        """Start, and kill at the moment. False where the command came to its end before."""
        process = self.start(command, name)
        if self.reached(process, moment):
            process.kill()
            self.struck(f"SIGKILL {name}", moment, process)
            return True
        self.expect(process, 0)
        return False

    def kill_and_finish(self, command: list[str], kills: int) -> None:
        for _ in range(kills):
            if self.started:
                self.reruns += 1
            if not self.kill_at(command, self.moment()):
                return
        self.finish(command)

    def expect(self, process: Process, *statuses: int, seconds: float = LIMIT) -> int:
        """The end of a process, as it should be."""
        status = process.wait(seconds)
        if process.showed_traceback:
            self.problems.append(f"{process.name} showed a traceback: {process.said()}")
        if statuses and status not in statuses:
            raise Failed(f"{process.name} ended with {status}, expected {statuses}: {process.said()}")
        return status

    def finish(self, command: list[str], name: str = "driver") -> None:
        """The same command once more: nothing is in its way, so it must come to its end."""
        self.reruns += bool(self.started)
        self.expect(self.start(command, name), 0)

    def verdict(self) -> None:
        """Compare with the unbroken run. Adds to ``problems``."""
        self.judged = True
        self.leave()
        found, expected = file_hashes(self.out), self.bench.reference
        if lost := sorted(expected.keys() - found.keys()):
            self.problems.append(f"lost: {', '.join(lost)}")
        if corrupt := sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name]):
            self.problems.append(f"corrupt: {', '.join(corrupt)}")
        if more := sorted(found.keys() - expected.keys()):
            self.problems.append(f"more than there should be: {', '.join(more)}")
        state = self.inspect()
        if state.unfinished or not state.sealed:
            self.problems.append(f"not finished: {state.stage}, {state.unfinished} blocks are open")
        if beside := sorted(p.name for p in self.out.parent.iterdir() if p != self.out and p.name != BALLAST):
            self.problems.append(f"left beside the output: {', '.join(beside)}")
        if opens := cannot_open(self.out):
            self.problems.append(f"is no OME-Zarr: {opens}")
        inside = (f for f in self.out.rglob("*") if f.suffix in (".__lock", ".new") or f.parent.name == "drivers")
        if left := sorted(str(f.relative_to(self.out)) for f in inside):
            self.notes["stale_files"] = left

    def leave(self) -> None:
        """No process may outlive its driver for long."""
        deadline = time.monotonic() + LEAVING
        while left := [pid for process in self.started for pid in process.family()]:
            if time.monotonic() > deadline:
                self.problems.append(f"{len(left)} processes are left")
                return
            time.sleep(0.1)

    def end(self) -> None:
        for process in self.started:
            process.kill()
            for pid in process.family():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
