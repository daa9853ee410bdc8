"""Trials of drivers on this machine, with threads or shares of a run: killed, stopped, two at once."""

from __future__ import annotations

import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from striking.bench import TOOL
from striking.moments import LATER, Moment
from striking.outputs import look_at
from striking.processes import run_quietly
from striking.trial import Trial


def kill_driver(trial: Trial) -> None:
    """The driver is killed, one to three times."""
    command = trial.command("--workers", str(trial.dice.choice((1, 1, 2))))
    trial.kill_and_finish(command, trial.dice.randint(1, 3))


def kill_work(trial: Trial) -> None:
    """Two or three `emdvol work --shard i/N`, any of which is killed and started again."""
    create = trial.command("--executor", "none")
    while trial.dice.random() < 0.3 and trial.kill_at(create, trial.moment("creating", "time"), "create"):
        trial.reruns += 1
    trial.expect(trial.start(create, "create"), 0)
    parts = trial.dice.choice((2, 2, 3))
    commands = [[*TOOL, "work", str(trial.out), "--shard", f"{i}/{parts}"] for i in range(parts)]
    at_work = [trial.start(command, "work") for command in commands]
    for _ in range(trial.dice.randint(1, 3)):
        victim, moment = trial.dice.randrange(parts), trial.moment(*LATER)
        if not trial.reached(at_work[victim], moment):
            continue
        at_work[victim].kill()
        trial.struck(f"SIGKILL work {victim}/{parts}", moment, at_work[victim])
        trial.reruns += 1
        at_work[victim] = trial.start(commands[victim], "work")
    for process in at_work:
        trial.expect(process, 0)


def two_drivers(trial: Trial) -> None:
    """Two commands on one output at once, from its creation on; one of them may be killed and started again."""
    command = trial.command()
    first = trial.start(command)
    time.sleep(trial.dice.choice((0.0, trial.dice.uniform(0, 0.2), trial.dice.uniform(0, trial.bench.seconds))))
    pair = [first, trial.start(command)]
    if trial.dice.random() < 0.6:
        victim, moment = trial.dice.randrange(2), trial.moment()
        if trial.reached(pair[victim], moment):
            pair[victim].kill()
            trial.struck("SIGKILL one of two", moment, pair[victim])
            trial.reruns += 1
            pair.append(trial.start(command))
            del pair[victim]
    else:
        trial.strikes.append({"what": "two drivers", "moment": "0 ms", "seconds": 0, "state": "not created"})
    for process in pair:
        trial.expect(process, 0)


def kill_at_system_call(trial: Trial) -> None:
    """Killed as a thread is about to do the n-th of its calls that change a disk: between any two of them, in time."""
    command = trial.command("--workers", str(trial.dice.choice((1, 2))))
    for _ in range(trial.dice.randint(1, 3)):
        call, most = trial.dice.choice((("rename", 30), ("fsync", 60), ("mkdir", 30), ("unlink", 20)))
        number = trial.dice.randint(1, most)
        trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
        process = trial.start([*trace, "-e", f"inject={call}:signal=KILL:when={number}", *command])
        if process.wait() == 0:
            break
        trial.struck("SIGKILL driver", Moment(f"before {call}", number, 0), process)
        trial.reruns += 1
    trial.expect(trial.start(command), 0)


def no_tracing() -> str:
    """Why system calls cannot be traced here; empty where they can."""
    if not shutil.which("strace"):
        return "there is no strace"
    return "strace is not allowed here" if run_quietly("strace", "-f", "true", check=False) else ""


def stop_driver(trial: Trial) -> None:
    """SIGTERM or SIGINT: within seconds, with 75 once the run has begun."""
    number = trial.dice.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT))
    flags = trial.dice.choice(((), ("--workers", "2"), ("--executor", "dask")))
    command = trial.command(*flags)
    driver, moment = trial.start(command), trial.moment()
    if trial.reached(driver, moment):
        asked, began = time.monotonic(), running(trial.out)
        driver.send(number)
        status = driver.wait()
        trial.struck(number.name, moment, driver)
        trial.notes |= {"seconds_to_stop": round(time.monotonic() - asked, 1), "status": status}
        # Before the run has begun and after it has ended nobody listens, and the system ends the process.
        expected = (75, 0) if began and not look_at(trial.out).sealed else (75, 0, -number, 1)
        if status not in expected:
            trial.problems.append(f"{number.name} ended the driver with {status}, expected {expected}")
        if driver.showed_traceback and began:
            trial.problems.append(f"{number.name} showed a traceback: {driver.said()}")
    else:
        trial.expect(driver, 0)
    trial.finish(command)


def running(out: Path) -> bool:
    """Whether a driver has announced itself."""
    with suppress(OSError):
        return any((out / "ledger" / "drivers").glob("*.json"))
    return False


def replace_output(trial: Trial) -> None:
    """--overwrite of an output of other settings, killed while the new one takes its place."""
    shutil.copytree(trial.bench.folder / "other.zarr", trial.out)
    command = trial.command("--overwrite")
    for _ in range(trial.dice.randint(1, 3)):
        moment = trial.moment("creating", "creating", "creating", "shard")
        process = trial.start(command)
        if not trial.reached(process, moment):
            trial.expect(process, 0)
            return
        process.kill()
        trial.struck("SIGKILL --overwrite", moment, process)
        trial.reruns += 1
    trial.expect(trial.start(command), 0)
