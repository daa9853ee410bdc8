"""An output that exists, brought to its end: blocks, pyramid, seal. By one driver or by several, in any order.

Convention: all that is needed lies in the output: the job, the ledger. A *share* i/N is the i-th of N parts of every
stage, for workers of an array job that share no scheduler; each also makes what of the pyramid its neighbours' parts
allow, and the one that finds everything done makes the rest and seals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from emdiffuse_vol.errors import BlockError, ConfigError, Stopped
from emdiffuse_vol.executors import Executor, Task
from emdiffuse_vol.geometry.boxes import Box, Triple, ceil_div
from emdiffuse_vol.reconstruct.drive import Drive, Halt, patiently
from emdiffuse_vol.reconstruct.job import Job
from emdiffuse_vol.reconstruct.ledger import ALL, FAILED, FINISHED, Ledger, Receipt, Share
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.presence import Announcer, announced, drivers
from emdiffuse_vol.reconstruct.pyramid import LevelTask

PATIENCE = 30 * 60.0  # seconds
GOLDEN = 0.618034  # drivers that meet on an output begin in places far from each other


@dataclass(frozen=True)
class Progress:
    """Told as blocks end, and now and then. stage: "blocks" or "level 1", ...; voxels: of the output, done so far by
    this command; workers: networks that can run now; link: where the executor can be watched."""

    stage: str
    done: int
    total: int
    voxels: int
    workers: int
    link: str | None = None


Notify = Callable[[Progress], None]


class Stage(Protocol):
    """One pass over an output: its blocks, or a level of its pyramid. ``grid``: of its blocks."""

    @property
    def name(self) -> str: ...

    @property
    def ledger(self) -> str: ...

    @property
    def grid(self) -> Triple: ...

    def task(self, expected: float) -> Task: ...

    def voxels(self, index: int) -> int: ...

    def needs(self, index: int) -> Box | None:
        """Blocks of the stage before that must be finished first, on its grid; None where nothing is needed."""
        ...


@dataclass(frozen=True)
class Blocks:
    job: Job
    permits: int
    threads: int | None
    name: str = "blocks"
    ledger: str = ""

    @property
    def grid(self) -> Triple:
        return self.job.plan.grid

    def task(self, expected: float) -> Task:
        # Torch loads here and not in drivers of the pyramid, or of nothing.
        from emdiffuse_vol.reconstruct.worker import BlockTask

        return BlockTask(self.job, self.permits, self.threads, expected)

    def voxels(self, index: int) -> int:
        return self.job.plan.write_box(index).size

    def needs(self, index: int) -> Box | None:
        return None


@dataclass(frozen=True)
class Level:
    """below: what a block of the stage before covers, in voxels of its level, and how many there are."""

    work: LevelTask
    below: Triple
    below_grid: Triple

    @property
    def name(self) -> str:
        return f"level {self.work.level}"

    @property
    def ledger(self) -> str:
        return f"level{self.work.level}"

    @property
    def grid(self) -> Triple:
        return self.work.grid

    def task(self, expected: float) -> Task:
        return replace(self.work, expected=expected)

    def voxels(self, index: int) -> int:
        return 0

    def needs(self, index: int) -> Box:
        fine = self.work.box(index)
        start: Any = tuple(2 * n // b for n, b in zip(fine.start, self.below, strict=True))
        stop: Any = tuple(ceil_div(2 * n, b) for n, b in zip(fine.stop, self.below, strict=True))
        return Box(start, stop) & Box.of(self.below_grid)


def stages(output: Output, job: Job, permits: int, threads: int | None) -> Iterator[Stage]:
    blocks = Blocks(job, permits, threads)
    yield blocks
    below, grid = job.block, blocks.grid
    for level, shape in enumerate(output.level_shapes()[1:], start=1):
        work = LevelTask(str(output.path.absolute()), level, shape, job.shard)
        yield Level(work, below, grid)
        below, grid = job.shard, work.grid


def complete(
    output: Output,
    job: Job,
    executor: Executor,
    kind: str,
    notify: Notify = lambda progress: None,
    *,
    share: Share = ALL,
    retry_failed: bool = False,
    patience: float = PATIENCE,
) -> None:
    """Do what is left of a share of a run. kind: of the executor, for people. retry_failed: of the blocks, only those
    that were set aside.

    Raises BlockError where blocks of the share were set aside, Stopped where the run ended early, and what else ends a
    run (see ``drive``).
    """
    others = sum(driver.live for driver in drivers(output.path))
    halt, previous, facts = Halt(), None, {}
    with announced(output.path, kind, f"{share[0]}/{share[1]}", executor.link) as announcer, halt.on_signals():
        output.log("run", executor=kind, share=share, link=executor.link)
        for stage in stages(output, job, executor.permits, executor.threads):
            ledger = Ledger(output.path, stage.ledger, stage.grid)
            part, ready = _what(stage, previous, share)
            before = [number for number in ledger.numbers(FAILED) if ledger.shares(number, part)]
            rest = iter(()) if retry_failed and previous is None else ledger.take(part, ready, (others * GOLDEN) % 1)
            teller = _Teller(stage, ledger, executor, announcer, notify)
            drive = Drive(
                ledger,
                executor,
                stage.task,
                chain(rest, before),  # what failed in an earlier run comes last
                output.log,
                halt,
                patience,
                teller,
            )
            started = time.monotonic()
            drive.run()
            output.log(
                "stage",
                stage=stage.name,
                done=drive.done,
                seconds=round(time.monotonic() - started, 3),
                voxels=teller.voxels,
                retried=drive.retried,
                read_bytes=teller.read_bytes,
            )
            ledger.refresh()
            _check(stage, ledger, part, retry_failed, drive.said)
            if previous is None and teller.read_bytes:
                facts = _reading(job, teller.voxels, teller.read_bytes)
            previous = ledger
        if previous is not None and previous.complete:
            patiently(output.seal, halt, output.log)
        output.end(facts)


def _reading(job: Job, voxels: int, read_bytes: int) -> dict[str, Any]:
    """read_bytes: of the input, as stored, while ``voxels`` of the output were made. They are compared with what those
    needed: voxels of the input, each counted once, uncompressed; of a part of the output, in proportion."""
    from emdiffuse_vol.reconstruct.estimate import totals

    itemsize = np.dtype(job.input_identity["dtype"]).itemsize
    needed = totals(job.plan, None).needed * itemsize * voxels / job.plan.region.size
    amplification = round(read_bytes / needed, 3)
    return {"read_bytes": read_bytes, "needed_bytes": round(needed), "read_amplification": amplification}


def _what(stage: Stage, previous: Ledger | None, share: Share) -> tuple[Share, Callable[[int], bool] | None]:
    """Which part of a stage to do, and which of its blocks can be done."""
    if previous is None:
        return share, None
    if previous.complete:  # whoever sees this is the last, or with the last: the bytes are the same
        return ALL, None

    def ready(index: int) -> bool:
        needed = stage.needs(index)
        return needed is None or previous.finished_in(needed)

    return share, ready


def _check(stage: Stage, ledger: Ledger, part: Share, retry_failed: bool, said: str) -> None:
    """A part that is not whole is no success. Raises BlockError, or Stopped where only the failed were to be done."""
    failed = [number for number in ledger.numbers(FAILED) if ledger.shares(number, part)]
    if failed:
        some = ", ".join(map(str, failed[:8])) + (", ..." if len(failed) > 8 else "")
        raise BlockError(
            f"{len(failed)} of {len(ledger)} {stage.name} failed and were set aside: {some} (the last: {said}); "
            f"see events.jsonl, mend the cause, then run again (--retry-failed takes only these)"
        )
    if retry_failed and not ledger.complete:
        raise Stopped(
            f"the blocks that had failed are done, {len(ledger) - ledger.finished} of {len(ledger)} are not; "
            f"run without --retry-failed"
        )


class _Teller:
    """Passes on what a drive does: to its file in the ledger, and to whoever watches this process."""

    def __init__(self, stage: Stage, ledger: Ledger, executor: Executor, announcer: Announcer, notify: Notify) -> None:
        self.stage, self.ledger, self.executor, self.announcer, self.notify = stage, ledger, executor, announcer, notify
        announcer.presence.stage = stage.name
        self.finished, self.voxels, self.read_bytes = ledger.finished, 0, 0
        self([], 0, 0)

    def __call__(self, receipts: list[Receipt], in_flight: int, retried: int) -> None:
        here, ended = self.announcer.presence, [receipt for receipt in receipts if receipt.state in FINISHED]
        self.finished += len(ended)
        self.voxels += sum(self.stage.voxels(receipt.index) for receipt in ended)
        self.read_bytes += sum(receipt.read_bytes for receipt in ended)
        here.done, here.voxels = here.done + len(ended), max(here.voxels, self.voxels)
        here.workers = self.executor.processes() * self.executor.permits
        here.in_flight, here.retried = in_flight, retried
        self.announcer.update()
        self.notify(Progress(self.stage.name, self.finished, len(self.ledger), self.voxels, here.workers, here.link))


def work(path: Path, workers: int, share: Share, retry_failed: bool, notify: Notify) -> Output:
    """What one of several workers without a scheduler does: its share of an output that exists already.

    Raises OutputError where there is no output of ours, ConfigError for a share that is none.
    """
    part, parts = share
    if not 0 <= part < parts:
        raise ConfigError(f"--shard {part}/{parts} is no part of a whole; give i/N with i from 0 to N - 1")
    output = Output(path)
    job = output.job()
    if not output.sealed:
        output.check_software()
        from emdiffuse_vol.executors.local import LocalExecutor

        executor = LocalExecutor(workers)
        try:
            complete(output, job, executor, "work", notify, share=share, retry_failed=retry_failed)
        finally:
            executor.close()
    return output
