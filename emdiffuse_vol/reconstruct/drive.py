"""Driving blocks to their end: a bounded window, and what is done when one does not end well.

Convention: errors say whose fault they are, by their class.

    OutputError, OSError          the place: a full disk, a folder that is read-only for a moment. Tried again with
                                  growing pauses; when nothing succeeds for PLACE_PATIENCE, the run stops
    ConfigError, WeightsError,    the set-up: the run stops at once
    ClusterError, ImportError
    a lost worker                 the cluster: tried again
    anything else                 the block: tried TRIES times, then set aside with its traceback; the run goes on

A block of which the process says that its time is up is not a failure and goes to another. What is recorded is on
disk; what is in flight when a run stops is computed again by the next.
"""

from __future__ import annotations

import heapq
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from emdiffuse_vol.errors import BlockError, ClusterError, ConfigError, OutputError, Stopped, WeightsError
from emdiffuse_vol.executors import Executor, Outcome, Task, capacity
from emdiffuse_vol.executors.walltime import OutOfTime, seconds_left
from emdiffuse_vol.reconstruct.ledger import FAILED, Ledger, Receipt

TRIES, PLACE_TRIES = 3, 20
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 15.0  # seconds before another try
PLACE_PATIENCE = 60.0  # seconds
HOPELESS = 8  # blocks set aside before the first that succeeds
COMMIT = 0.25  # seconds in which receipts may gather before they are recorded
FORGET = 0.98  # a slow block counts less with each that follows: once, a disk may hang
GRACE = 3.0  # seconds that blocks in flight have after a signal

Log = Callable[..., None]


class Halt:
    """Asks a run to end early: by a signal, or because its time is up."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.until = 0.0

    def ask(self, reason: str, grace: float) -> None:
        """Start nothing more; wait up to ``grace`` seconds for what is in flight."""
        if self.reason is None:
            self.reason, self.until = reason, time.monotonic() + grace

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask; a second one raises KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: Any) -> None:
            if self.reason is not None:
                raise KeyboardInterrupt
            self.ask(signal.Signals(number).name, GRACE)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def patiently(work: Callable[[], None], halt: Halt, log: Log) -> None:
    """Try again what the place does not let us do, as with blocks. Raises OutputError after PLACE_PATIENCE."""
    pause, until = FIRST_PAUSE, time.monotonic() + PLACE_PATIENCE
    while True:
        try:
            return work()
        except (OutputError, OSError) as error:
            if halt.reason is not None or time.monotonic() > until:
                raise OutputError(f"{error}; mend that, and the same command continues") from error
            log("waiting", error=str(error))
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


@dataclass
class Drive:
    """One stage of a run. ``make_task(expected)``: the task, told how many seconds a block takes; ``numbers``: blocks
    to do; ``patience``: seconds without any worker after which the run stops; ``notify``: told of receipts once they
    are recorded, and without any now and then."""

    ledger: Ledger
    executor: Executor
    make_task: Callable[[float], Task]
    numbers: Iterator[int]
    log: Log
    halt: Halt
    patience: float
    notify: Callable[[list[Receipt], int, int], None]  # recorded receipts, blocks in flight, tries again so far
    expected: float = 0.0
    flight: set[int] = field(default_factory=set)
    again: list[tuple[float, int]] = field(default_factory=list)  # (when, number), a heap
    tries: dict[tuple[int, bool], int] = field(default_factory=dict)  # of a block, by its own fault or the place's
    unrecorded: list[Receipt] = field(default_factory=list)
    exhausted: bool = False
    retried: int = 0
    aside: int = 0
    said: str = ""  # by the last that was set aside
    done: int = 0
    committed: float = 0.0
    trouble: tuple[float, float, Exception] | None = None  # with the place: since when, until when, and the last
    alone_since: float | None = None

    def run(self) -> None:
        """Returns when every block has ended, well or set aside. Raises Stopped, or the error that ends the run."""
        try:
            while self._work_left() or self.unrecorded:
                self._check_halt()
                self._fill()
                outcomes = self.executor.wait(self._pause())
                for outcome in outcomes:
                    self._settle(outcome)
                self._fill()  # no process waits while we record
                if not outcomes or time.monotonic() > self.committed + COMMIT:
                    self._commit()
                self._check_place()
                self._check_workers()
        except BaseException:
            self._commit()
            raise

    def _work_left(self) -> bool:
        return bool(self.flight or self.again or not self.exhausted)

    def _fill(self) -> None:
        """Submit up to the window: blocks that are due for another try first."""
        if self.halt.reason is not None:
            return
        task = self.make_task(self.expected)
        for _ in range(capacity(self.executor) - len(self.flight)):
            if self.again and self.again[0][0] <= time.monotonic():
                number = heapq.heappop(self.again)[1]
            elif (found := next(self.numbers, None)) is not None:
                number = found
            else:
                self.exhausted = True
                return
            self.flight.add(number)
            self.executor.submit(task, number)

    def _pause(self) -> float:
        """Seconds to wait for an outcome."""
        if not self._work_left():
            return 0
        if self.unrecorded:
            return COMMIT
        due = self.again[0][0] - time.monotonic() if self.again else 0.0
        # What is due already waits for room in the window, which is an outcome.
        return min(0.5, due) if due > 0 else 0.5

    def _settle(self, outcome: Outcome) -> None:
        number, error = outcome.number, outcome.error
        self.flight.discard(number)
        if error is None:
            receipt: Receipt = outcome.result
            self.expected = max(FORGET * self.expected, receipt.seconds)
            self.unrecorded.append(receipt)
            self.done += 1
            if receipt.batch is not None:
                self.log("out of memory", block=number, batch=receipt.batch)
        elif isinstance(error, OutOfTime):
            self._later(number, 0)
            if not self.executor.renewable:
                left = seconds_left() or 0
                self.halt.ask(f"the walltime ({error})", max(GRACE, left - GRACE))
        elif isinstance(error, ConfigError | WeightsError | ClusterError):
            raise error
        elif isinstance(error, ImportError):
            raise ClusterError(f"a worker cannot load what a block needs: {error}; give it the driver's environment")
        else:
            self._failed(outcome, error)

    def _failed(self, outcome: Outcome, error: Exception) -> None:
        number, place = outcome.number, isinstance(error, OutputError | OSError) and not outcome.lost
        tries = self.tries[number, place] = self.tries.get((number, place), 0) + 1
        said = " ".join(str(error).split())[:300] or type(error).__name__
        if place:
            self._trouble_with(error)
        if tries < (PLACE_TRIES if place else TRIES):
            self.retried += 1
            self.log("retry", block=number, tries=tries, lost=outcome.lost, error=said)
            self._later(number, min(FIRST_PAUSE * 2 ** (tries - 1), LONGEST_PAUSE))
            return
        if self.ledger.finished_by_now(number):  # by another driver, with more luck
            return
        self.aside, self.said = self.aside + 1, said
        self.log("failed", block=number, tries=tries, error=said, traceback=outcome.trace)
        self.unrecorded.append(Receipt(number, state=FAILED, tries=min(tries, 255)))
        if self.aside >= HOPELESS and not self.done:
            raise BlockError(f"{self.aside} blocks failed and none succeeded, so the run was stopped; the last: {said}")

    def _later(self, number: int, seconds: float) -> None:
        heapq.heappush(self.again, (time.monotonic() + seconds, number))

    def _commit(self) -> None:
        """Record what has gathered. Where the place does not let us, it stays for the next time."""
        self.committed = time.monotonic()
        recorded, self.unrecorded = self.unrecorded, []
        try:
            self.ledger.record(recorded)
        except (OutputError, OSError) as error:
            self.unrecorded = recorded
            self._trouble_with(error)
            return
        if recorded:
            self.trouble = None
        self.notify(recorded, len(self.flight), self.retried)

    def _trouble_with(self, error: Exception) -> None:
        now = time.monotonic()
        self.trouble = (self.trouble[0] if self.trouble else now, now, error)

    def _check_place(self) -> None:
        # From error to error, not to this moment: a block that is tried again may well take longer than the patience.
        if self.trouble and self.trouble[1] > self.trouble[0] + PLACE_PATIENCE:
            error = self.trouble[2]
            raise OutputError(f"{error}; mend that, and the same command continues") from error

    def _check_halt(self) -> None:
        # Blocks in flight may end while there is time; a run whose last block is in is not stopped any more.
        if self.halt.reason is None or (self.flight and time.monotonic() < self.halt.until):
            return
        raise Stopped(f"stopped by {self.halt.reason}; the same command continues")

    def _check_workers(self) -> None:
        now = time.monotonic()
        if self.executor.processes():
            self.alone_since = None
        elif self.alone_since is None:
            self.alone_since = now
            self.log("no workers")
        elif now > self.alone_since + self.patience:
            raise Stopped(
                f"there has been no worker for {self.patience / 60:g} min, so the run was stopped; "
                f"see why the cluster gives none, then the same command continues"
            )
