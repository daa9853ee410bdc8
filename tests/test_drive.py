"""What a run does when blocks do not end well: the real executor and a real ledger, with tasks that take no network."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emdiffuse_vol.errors import BlockError, ConfigError, OutputError, Stopped
from emdiffuse_vol.executors import AHEAD
from emdiffuse_vol.executors.local import LocalExecutor
from emdiffuse_vol.executors.walltime import OutOfTime
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.reconstruct import drive as policy
from emdiffuse_vol.reconstruct import engine
from emdiffuse_vol.reconstruct import ledger as ledgers
from emdiffuse_vol.reconstruct.drive import Drive, Halt
from emdiffuse_vol.reconstruct.ledger import DONE, FAILED, PENDING, Ledger, Receipt, Share
from emdiffuse_vol.reconstruct.output import Output

Grid = tuple[int, int, int]
GRID: Grid = (1, 2, 6)
BLOCKS = 12


@dataclass
class Work:
    """A task that does what ``misdeeds`` say of a block, once for each call, and then ends well. ``signals``: that this
    process gets as a block begins."""

    misdeeds: dict[int, list[Exception]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    signals: dict[int, signal.Signals] = field(default_factory=dict)
    calls: Counter[int] = field(default_factory=Counter)

    def __call__(self, index: int) -> Receipt:
        self.calls[index] += 1
        if index in self.signals:
            os.kill(os.getpid(), self.signals[index])
        time.sleep(self.seconds.get(index, 0))
        if waiting := self.misdeeds.get(index):
            raise waiting.pop(0)
        return Receipt(index, seconds=0.01)


class Always(list[Exception]):
    """Misdeeds without end."""

    def pop(self, index: Any = 0) -> Exception:
        return self[0]


@dataclass(frozen=True)
class Toy:
    """A stage whose task is a function here."""

    function: Callable[[int], Receipt]
    name: str = "blocks"
    ledger: str = ""
    grid: Grid = GRID

    def task(self, expected: float) -> Callable[[int], Receipt]:
        return self.function

    def voxels(self, index: int) -> int:
        return 1

    def needs(self, index: int) -> Box | None:
        """Of a level: the two blocks that it is made of."""
        y, x = divmod(index, self.grid[2])
        return Box((0, y, 2 * x), (1, y + 1, 2 * x + 2)) if self.ledger else None


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(policy, "LONGEST_PAUSE", 0.1)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """As much of an output as the engine asks for."""
    (tmp_path / "zarr.json").write_text(json.dumps({"attributes": {"emdvol": {"sealed": False}}}))
    Ledger.create(tmp_path, "", GRID)
    Ledger.create(tmp_path, "level1", (1, 2, 3))
    return tmp_path


@pytest.fixture
def executor() -> Iterator[LocalExecutor]:
    made = LocalExecutor(1)
    yield made
    made.close()


def drive(out: Path, executor: LocalExecutor, task: Callable[[int], Receipt], **changes: Any) -> Drive:
    ledger = Ledger(out, "", GRID)
    given = {"numbers": ledger.take(), "halt": Halt(), "patience": 60.0, "notify": lambda *told: None} | changes
    return Drive(ledger, executor, lambda expected: task, log=Output(out).log, **given)


def complete(monkeypatch: pytest.MonkeyPatch, out: Path, executor: LocalExecutor, *stages: Toy, **options: Any) -> None:
    monkeypatch.setattr(engine, "stages", lambda *of: iter(stages))
    engine.complete(Output(out), None, executor, "local", **options)  # type: ignore[arg-type]


def state(out: Path, name: str = "", grid: Grid = GRID) -> list[int]:
    return Ledger(out, name, grid).state.ravel().tolist()


def events(out: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in Output(out).events() if event["event"] == name]


# --- The place -------------------------------------------------------------------------------------------------------


def test_errors_of_the_place_are_tried_again(out: Path, executor: LocalExecutor) -> None:
    work = Work({3: [OSError("disk full")] * 5, 7: [OutputError("read-only")]})
    drive(out, executor, work).run()
    assert state(out) == [DONE] * BLOCKS
    assert work.calls[3] == 6 and work.calls[7] == 2
    assert {(event["block"], event["error"]) for event in events(out, "retry")} == {(3, "disk full"), (7, "read-only")}


def test_trouble_with_the_place_does_not_count_against_a_block(out: Path, executor: LocalExecutor) -> None:
    drive(out, executor, Work({3: [*[OSError("disk full")] * 5, ValueError("once"), OSError("disk full")]})).run()
    assert state(out) == [DONE] * BLOCKS


def test_a_place_that_stays_unusable_stops_the_run_and_keeps_what_is_recorded(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "PLACE_PATIENCE", 0.5)
    work = Work({index: Always([OSError("disk full")]) for index in range(4, BLOCKS)})
    started = time.monotonic()
    with pytest.raises(OutputError, match="disk full; mend that, and the same command continues"):
        drive(out, executor, work).run()
    assert time.monotonic() - started > 0.5
    assert state(out) == [DONE] * 4 + [PENDING] * 8
    drive(out, executor, again := Work()).run()
    assert state(out) == [DONE] * BLOCKS and sorted(again.calls) == list(range(4, BLOCKS))


def test_blocks_slower_than_the_patience_are_not_taken_for_a_place_that_stays_unusable(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "PLACE_PATIENCE", 0.3)
    work = Work({0: [OSError("disk full")]}, seconds={0: 1.0})
    drive(out, executor, work, numbers=iter([0])).run()
    assert state(out)[0] == DONE


def test_receipts_wait_until_the_ledger_can_be_written(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, full = Ledger.record, [OutputError("the ledger cannot be written: disk full")] * 4

    def refuse(self: Ledger, receipts: Any) -> None:
        if receipts and full:
            raise full.pop()
        record(self, receipts)

    monkeypatch.setattr(Ledger, "record", refuse)
    drive(out, executor, work := Work()).run()
    assert state(out) == [DONE] * BLOCKS and not full
    assert set(work.calls.values()) == {1}, "a block whose receipt waits is not computed again"


def test_a_ledger_that_stays_unwritable_stops_the_run(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Ledger, receipts: Any) -> None:
        if receipts:
            raise OutputError("the ledger cannot be written: disk full")

    monkeypatch.setattr(policy, "PLACE_PATIENCE", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record", refuse)
        with pytest.raises(OutputError, match="disk full; mend that"):
            drive(out, executor, Work()).run()
    assert state(out) == [PENDING] * BLOCKS


# --- Blocks ----------------------------------------------------------------------------------------------------------


def test_a_block_that_always_fails_is_set_aside_with_its_traceback_and_the_others_are_done(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work({2: Always([ValueError("no such grey")]), 5: [ValueError("once")]})
    with pytest.raises(BlockError, match=r"1 of 12 blocks failed and were set aside: 2 \(the last: no such grey\)"):
        complete(monkeypatch, out, executor, Toy(work))
    assert state(out) == [DONE, DONE, FAILED, *[DONE] * 9]
    assert work.calls[2] == policy.TRIES and work.calls[5] == 2
    (failed,) = events(out, "failed")
    assert failed["block"] == 2 and "Traceback" in failed["traceback"] and "no such grey" in failed["traceback"]
    assert Ledger(out, "", GRID).read("tries").ravel()[2] == policy.TRIES
    assert not Output(out).sealed


def test_a_block_that_fails_here_and_was_done_by_another_driver_stays_done(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def task(index: int) -> Receipt:
        if index == 4:
            Ledger(out, "", GRID).record([Receipt(4)])
            raise ValueError("this GPU is broken")
        return Receipt(index)

    complete(monkeypatch, out, executor, Toy(task))
    assert state(out) == [DONE] * BLOCKS and Output(out).sealed


def test_the_next_run_takes_blocks_that_failed_again_and_seals(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BlockError, match="2 of 12 blocks failed and were set aside: 2, 9"):
        complete(monkeypatch, out, executor, Toy(Work({i: Always([ValueError("bad")]) for i in (2, 9)})))
    complete(monkeypatch, out, executor, Toy(work := Work()))
    assert state(out) == [DONE] * BLOCKS and sorted(work.calls) == [2, 9]
    assert Output(out).sealed


def test_retry_failed_takes_only_the_blocks_that_failed(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ledger(out, "", GRID).record([Receipt(1, state=FAILED), Receipt(2)])
    with pytest.raises(Stopped, match="are done, 10 of 12 are not; run without --retry-failed"):
        complete(monkeypatch, out, executor, Toy(work := Work()), retry_failed=True)
    assert sorted(work.calls) == [1] and state(out)[:3] == [PENDING, DONE, DONE]


def test_a_run_in_which_nothing_succeeds_is_stopped(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work({i: Always([ValueError("bad weights")]) for i in range(BLOCKS)})
    with pytest.raises(BlockError, match="8 blocks failed and none succeeded, so the run was stopped; the last: bad"):
        complete(monkeypatch, out, executor, Toy(work))
    assert state(out).count(FAILED) == policy.HOPELESS and state(out).count(PENDING) == 4


@pytest.mark.parametrize(
    "error", [ConfigError("a typo"), ImportError("no module named torch")], ids=["config", "import"]
)
def test_errors_of_the_set_up_stop_the_run_at_once(out: Path, executor: LocalExecutor, error: Exception) -> None:
    work = Work({4: [error]})
    with pytest.raises(Exception, match=str(error)):
        drive(out, executor, work).run()
    assert work.calls[4] == 1 and not events(out, "retry")
    assert set(state(out)) <= {PENDING, DONE} and state(out)[4] == PENDING


def test_tries_again_wait_without_burning_the_cpu_while_the_window_is_full(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = count()
    wait = executor.wait
    monkeypatch.setattr(executor, "wait", lambda seconds: (next(waits), wait(seconds))[1])
    work = Work({0: [OSError("once")]}, seconds=dict.fromkeys(range(1, 7), 0.7))
    drive(out, executor, work).run()
    assert state(out) == [DONE] * BLOCKS
    assert next(waits) < 100


# --- Stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_within_seconds(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(policy, "GRACE", 0.5)
    work = Work(seconds={3: 30.0}, signals={3: number})  # one that does not end in time
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {number.name}; the same command continues"):
        complete(monkeypatch, out, executor, Toy(work))
    assert signal.getsignal(number) is before
    assert state(out)[3] == PENDING and not Output(out).sealed
    assert not list((out / "ledger" / "drivers").glob("*"))


def test_a_second_signal_does_not_wait(out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "GRACE", 20.0)
    work = Work(seconds=dict.fromkeys(range(3), 30.0), signals={0: signal.SIGTERM, 1: signal.SIGINT})
    with pytest.raises(KeyboardInterrupt):
        complete(monkeypatch, out, executor, Toy(work))


def test_what_ends_in_the_grace_after_a_signal_is_recorded(out: Path, executor: LocalExecutor) -> None:
    halt = Halt()
    threading.Timer(0.2, halt.ask, ("SIGTERM", 10.0)).start()
    work = Work(seconds=dict.fromkeys(range(BLOCKS), 0.5))
    with pytest.raises(Stopped):
        drive(out, executor, work, halt=halt).run()
    assert state(out).count(DONE) == len(work.calls) == 1 + AHEAD


def test_sealing_waits_for_a_full_disk_as_blocks_do(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal, full = Output.seal, [OutputError("disk full"), OSError("disk full")]

    def sealed(output: Output) -> None:
        if full:
            raise full.pop()
        seal(output)

    monkeypatch.setattr(Output, "seal", sealed)
    complete(monkeypatch, out, executor, Toy(Work()))
    assert Output(out).sealed and len(events(out, "waiting")) == 2
    monkeypatch.setattr(policy, "PLACE_PATIENCE", 0.1)
    full += [OutputError("disk full")] * 99
    with pytest.raises(OutputError, match="disk full; mend that, and the same command continues"):
        complete(monkeypatch, out, executor, Toy(Work()))


def test_a_process_whose_time_is_up_stops_the_run(out: Path, executor: LocalExecutor) -> None:
    work = Work({5: Always([OutOfTime("9 s are left, and a block takes 10 s")])})
    with pytest.raises(Stopped, match="stopped by the walltime"):
        drive(out, executor, work).run()
    assert state(out)[:5] == [DONE] * 5 and state(out)[5] == PENDING
    assert not events(out, "failed") and not events(out, "retry")


def test_a_process_that_is_replaced_when_its_time_is_up_stops_nothing(out: Path, executor: LocalExecutor) -> None:
    executor.renewable = True
    work = Work({5: [OutOfTime("9 s are left")] * 7})  # more often than a block may fail
    drive(out, executor, work).run()
    assert state(out) == [DONE] * BLOCKS and work.calls[5] == 8


def test_a_run_without_workers_waits_and_then_stops(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "processes", lambda: 0)
    started = time.monotonic()
    with pytest.raises(Stopped, match="no worker for"):
        drive(out, executor, Work(), patience=1.0).run()
    assert time.monotonic() - started > 1.0
    assert len(events(out, "no workers")) == 1


def test_workers_that_come_back_are_waited_for(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = time.monotonic() + 1
    monkeypatch.setattr(executor, "processes", lambda: int(time.monotonic() > back))
    drive(out, executor, Work(), patience=30).run()
    assert state(out) == [DONE] * BLOCKS


# --- Many blocks -----------------------------------------------------------------------------------------------------


def test_a_million_blocks_are_taken_one_by_one(tmp_path: Path, executor: LocalExecutor) -> None:
    grid = (100, 100, 100)
    Ledger.create(tmp_path, "", grid)
    ledger, ended, most = Ledger(tmp_path, "", grid), count(), 0
    taken = count()
    numbers = (number for number in ledger.take() if next(taken) >= 0)
    halt = Halt()

    def task(index: int) -> Receipt:
        nonlocal most
        if next(ended) == 200:
            halt.ask("the test", 0)
        return Receipt(index)

    def notify(receipts: list[Receipt], in_flight: int, retried: int) -> None:
        nonlocal most
        most = max(most, in_flight)

    made = Drive(ledger, executor, lambda expected: task, numbers, Output(tmp_path).log, halt, 60, notify)
    with pytest.raises(Stopped):
        made.run()
    ahead = next(taken) - ledger.finished
    assert ledger.finished >= 200 - most and 0 <= ahead <= 1 + AHEAD and most <= 1 + AHEAD
    assert made.tries == {} and len(made.flight) <= 1 + AHEAD


# --- Ledger ----------------------------------------------------------------------------------------------------------


def hammer(out: Path, numbers: list[int]) -> None:
    """Called in another process: record blocks, one write for each."""
    ledger = Ledger(out, "", (4, 4, 4))
    for number in numbers:
        ledger.record([Receipt(number, seconds=number + 1, checksum=number + 7)])


def test_processes_that_record_in_one_region_lose_nothing_even_when_one_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "MOST_REGIONS", 1)
    Ledger.create(tmp_path, "", (4, 4, 4))
    assert len([*(tmp_path / "ledger" / "state").rglob("0")]) <= 1
    spawn = multiprocessing.get_context("spawn")
    shares = [list(range(0, 64, 2)), list(range(1, 64, 2)), list(range(64)) * 1000]
    writers = [spawn.Process(target=hammer, args=(tmp_path, share)) for share in shares]
    for writer in writers:
        writer.start()
    while Ledger(tmp_path, "", (4, 4, 4)).finished < 20 and writers[2].is_alive():
        time.sleep(0.01)
    writers[2].kill()  # somewhere inside a write
    for writer in writers[:2]:
        writer.join(120)
        assert writer.exitcode == 0
    ledger = Ledger(tmp_path, "", (4, 4, 4))
    assert ledger.complete
    assert ledger.read("seconds").ravel().tolist() == list(range(1, 65))
    assert ledger.read("checksum").ravel().tolist() == list(range(7, 71))


grids = st.tuples(*[st.integers(1, 9)] * 3)


@settings(max_examples=20, deadline=None)
@given(grid=grids, parts=st.integers(1, 40), edge=st.sampled_from([1, 30, 4096]))
def test_shares_partition_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, grid: Grid, parts: int, edge: int
) -> None:
    out = tmp_path_factory.mktemp("shares")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledgers, "MOST_REGIONS", edge)
        Ledger.create(out, "", grid)
    ledger = Ledger(out, "", grid)
    taken = [list(ledger.take((part, parts))) for part in range(parts)]
    assert sorted(number for numbers in taken for number in numbers) == list(range(len(ledger)))
    for part, numbers in enumerate(taken):
        assert all(ledger.shares(number, (part, parts)) for number in numbers)
        assert sorted(ledger.take((part, parts), start=0.618)) == sorted(numbers)


def test_taking_goes_on_where_others_have_come_to(out: Path) -> None:
    mine, other = Ledger(out, "", GRID), Ledger(out, "", GRID)
    numbers = mine.take()
    first = next(numbers)
    other.record([Receipt(index) for index in range(BLOCKS) if index not in (first, 10)])
    assert list(numbers) == [10]
    assert list(Ledger(out, "", GRID).take()) == [first, 10]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_shares_build_what_they_can_of_the_pyramid_and_the_last_one_seals(
    out: Path, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    made: Counter[str] = Counter()

    def stages_of(share: Share) -> list[Toy]:
        def level(index: int) -> Receipt:
            needed = Toy(level, ledger="level1", grid=(1, 2, 3)).needs(index)
            assert needed is not None and Ledger(out, "", GRID).finished_in(needed)
            made[f"level {index}"] += 1
            return Receipt(index)

        return [Toy(Work()), Toy(level, "level 1", "level1", (1, 2, 3))]

    for turn, part in enumerate(order):
        assert Output(out).sealed is False
        complete(monkeypatch, out, executor, *stages_of((part, 2)), share=(part, 2))
        assert state(out).count(DONE) == (turn + 1) * BLOCKS // 2
    assert Output(out).sealed
    assert made == {f"level {index}": 1 for index in range(6)}


def test_whole_lines_of_the_log_are_read_whatever_is_broken_between_them(out: Path) -> None:
    output = Output(out)
    output.log("run", executor="local")
    with (out / "events.jsonl").open("ab") as log:
        log.write(b'{"event": "cut in the mid\n\xff\xfe\n')
    output.log("sealed")
    assert [event["event"] for event in output.events()] == ["run", "sealed"]
