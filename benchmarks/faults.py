"""Kill anywhere (law 8): runs that are struck at random moments, continued by the same command, and compared.

    python benchmarks/faults.py [--trials 120] [--seed 0] [--kinds driver,work] benchmarks/results/faults.json

Convention: a trial is a kind and a seed, and these alone decide what is struck, how often, and at which *moments*: at a
share of the time that an unbroken run takes, or some milliseconds after the n-th change that is seen in the files of a
stage (creation, shards, ledger, pyramid, seal). Every start of a process is the same command as before. A trial is
passed when that command ends with 0, every file of the image has the bytes of an unbroken run, the ledger says of each
block that it is done, with the checksum of what is stored, nothing lies beside the output, no process is left, and
nobody was shown a traceback. After each strike, blocks that are recorded must be on disk.

A network of two channels with random weights, and 9 blocks with two levels above them: what is tried is the engine.
Starting Python takes most of the time. Disks that fill up and places that become read-only are small file systems in
memory; mounting them needs root. Kills just before the n-th system call of a sort need strace. Where these cannot be
had, their kinds are left out and the report says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from emdiffuse_vol import __version__
from emdiffuse_vol.errors import EmdvolError

LIMIT = 240.0  # seconds after which a process is taken to hang
LEAVING = 20.0  # seconds that what a killed process has started may outlive it
POLL, IDLE = 0.0004, 0.005  # seconds between looks at the files, once there are any and before
DISK = 12 << 20  # bytes; the output needs 1.5 MB
IMPATIENT = (
    "import emdiffuse_vol.reconstruct.drive as drive; drive.PLACE_PATIENCE = 3.0; "
    "from emdiffuse_vol.cli.main import run; run()"
)
TOOL = (sys.executable, "-m", "emdiffuse_vol")
LEVELS = 2  # above the first


# --- What is run -----------------------------------------------------------------------------------------------------


class Bench:
    """A small input, an unbroken run of it, and an output of other settings. ``seconds``: that the unbroken took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.input, self.weights = folder / "in.zarr", folder / "w.safetensors"
        make_input(self.input)
        make_weights(self.weights)
        started = time.monotonic()
        self.make(folder / "unbroken.zarr")
        self.seconds = time.monotonic() - started
        self.reference = file_hashes(folder / "unbroken.zarr")
        self.make(folder / "other.zarr", "--seed", "1")

    def make(self, out: Path, *flags: str) -> None:
        done = subprocess.run(self.command(out, *flags), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"an unbroken run failed:\n{done.stdout}\n{done.stderr}")

    def command(self, out: Path, *flags: str, tool: tuple[str, ...] = TOOL) -> list[str]:
        settings = ["--weights", str(self.weights), "--shard", "64,64,64", "--tile", "64,64,64", "--members", "2"]
        return [*tool, "reconstruct", str(self.input), "--out", str(out), *settings, *flags]


def make_input(path: Path) -> None:
    from emdiffuse_vol.stores.convert import convert
    from emdiffuse_vol.stores.phantom import PhantomVolume

    convert(PhantomVolume.from_url("phantom:5x8x560?voxel_size=50,10,10&seed=0"), path)


def make_weights(path: Path) -> None:
    """Random everywhere: a layer that begins as zeros would hide what lies behind it."""
    import torch

    from emdiffuse_vol.models.checkpoints import save_weights
    from emdiffuse_vol.models.slab import SlabNet

    config = {"width": 4, "deep": 4}
    net, generator = SlabNet(**config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            fan = p[0].numel() if p.ndim > 1 else 100
            p.copy_(torch.randn(p.shape, generator=generator) * (0.03 if "out" in name else 1.2) / fan**0.5)
    save_weights(path, net, architecture="slab", config=config, modes=["vEMDiffuse-a"], gaps=[1.1, 20])


# --- Processes -------------------------------------------------------------------------------------------------------


class Process:
    """A command in a session of its own; what it prints goes to files, so that a full pipe stops nobody."""

    def __init__(self, command: list[str], folder: Path, name: str) -> None:
        self.command, self.name = command, name
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self._process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True, cwd=folder)
        self.pid = self._process.pid
        self.started = time.monotonic()

    @property
    def status(self) -> int | None:
        return self._process.poll()

    def send(self, number: int) -> None:
        self._process.send_signal(number)  # not to another that has its number by now

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self._process.wait()

    def wait(self, seconds: float = LIMIT) -> int:
        """Exit status. Raises Failed where it hangs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failed(f"{self.name} hung: no end in {seconds:.0f} s; {self.said()}") from None

    def said(self) -> str:
        """The end of what it had to complain of."""
        return self.err.read_text(errors="replace").strip()[-600:]

    @property
    def showed_traceback(self) -> bool:
        return "Traceback" in self.err.read_text(errors="replace")

    def family(self) -> list[int]:
        """Other processes of its session that still run."""
        return [pid for pid in processes(self.pid) if pid != self.pid]


def processes(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                state, _, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its) == session and state != "Z":
                    found.append(int(entry.name))
    return found


def dask_workers(process: Process) -> list[int]:
    """Processes that nannies of this process have started."""
    found = []
    for pid in process.family():
        with suppress(OSError):
            said = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"spawn_main" in said and b"resource_tracker" not in said:
                found.append(pid)
    return found


# --- Moments ---------------------------------------------------------------------------------------------------------


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


# --- What an output is like ------------------------------------------------------------------------------------------


def file_hashes(path: Path) -> dict[str, str]:
    """Of all files of the image's arrays. Locks that killed writers left are not read by anybody: counted elsewhere."""
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.relative_to(path).parts[0].isdigit())
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.suffix != ".__lock"
    }


@dataclass
class State:
    """Finished blocks of each stage. wrong: those recorded whose voxels are not on disk."""

    finished: dict[str, int] = field(default_factory=dict)
    unfinished: int = 0
    wrong: list[str] = field(default_factory=list)
    sealed: bool = False

    @property
    def stage(self) -> str:
        if not self.finished:
            return "not created"
        if self.sealed:
            return "sealed"
        return " ".join(f"{name}:{count}" for name, count in self.finished.items())


def look_at(out: Path) -> State:
    """Read an output as the next driver would, and each recorded block."""
    from emdiffuse_vol.reconstruct.engine import stages
    from emdiffuse_vol.reconstruct.ledger import FINISHED, Ledger, checksum
    from emdiffuse_vol.reconstruct.output import Output
    from emdiffuse_vol.reconstruct.verify import place_of
    from emdiffuse_vol.stores.blocks import read_block

    state, output = State(), Output(out)
    if not out.exists():
        return state
    job = output.job()
    state.sealed = output.sealed
    for stage in stages(output, job, 1, 1):
        ledger = Ledger(out, stage.ledger, stage.grid)
        state.finished[stage.name] = ledger.finished
        state.unfinished += len(ledger) - ledger.finished
        sums = ledger.read("checksum").ravel()
        for index in (i for i in range(len(ledger)) if ledger.state.ravel()[i] in FINISHED):
            if checksum(read_block(out, *place_of(job, stage, index))) != sums[index]:
                state.wrong.append(f"{stage.name} {index}")
    return state


class Failed(Exception):
    """Something that must not happen, in words."""


# --- A trial ---------------------------------------------------------------------------------------------------------


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


def cannot_open(out: Path) -> str:
    """Why a reader that is not ours refuses the image; empty where it does not."""
    try:
        import ome_zarr_models
    except ModuleNotFoundError:
        return ""
    try:
        ome_zarr_models.open_ome_zarr(str(out), version="0.5")
    except Exception as error:  # whatever it says
        return " ".join(str(error).split())[:300]
    return ""


# --- Kinds -----------------------------------------------------------------------------------------------------------


def kill_driver(trial: Trial) -> None:
    """The driver is killed, one to three times."""
    command = trial.command("--workers", str(trial.dice.choice((1, 1, 2))))
    _kill_and_finish(trial, command, trial.dice.randint(1, 3))


def kill_dask_driver(trial: Trial) -> None:
    """The driver of a dask cluster on this machine; its workers must go by themselves."""
    command = trial.command("--executor", "dask", "--workers", str(trial.dice.choice((1, 2))))
    _kill_and_finish(trial, command, trial.dice.randint(1, 2))


def _kill_and_finish(trial: Trial, command: list[str], kills: int) -> None:
    for _ in range(kills):
        if trial.started:
            trial.reruns += 1
        if not trial.kill_at(command, trial.moment()):
            return
    trial.finish(command)


def kill_dask_worker(trial: Trial) -> None:
    """Workers of the driver's own cluster, as they start, at work, and as they replace others. The driver goes on; only
    one whose first workers do not come up ends, with one line."""
    workers = trial.dice.choice((1, 2))
    command = trial.command("--executor", "dask", "--workers", str(workers))
    driver = trial.start(command)
    for _ in range(trial.dice.randint(1, 2)):
        moment = trial.moment("shard", "ledger", "pyramid", "time", "worker")
        replaced, pause = trial.dice.random() < 0.4, trial.dice.uniform(0, 2)
        if not trial.reached(driver, moment):
            break
        killed = kill_workers(trial, driver, moment, dask_workers(driver))
        if replaced and killed and (fresh := replacements(driver, killed)):
            time.sleep(pause)
            kill_workers(trial, driver, moment, fresh)
    if trial.expect(driver, 0, 1):
        if look_at(trial.out).finished.get("blocks") or not one_line(driver):
            trial.problems.append(f"the driver did not go on: {driver.said()}")
        trial.finish(command)


def kill_workers(trial: Trial, process: Process, moment: Moment, found: list[int]) -> list[int]:
    """One or two of them. Returns which."""
    chosen = trial.dice.sample(found, min(len(found), trial.dice.randint(1, 2)))
    for pid in chosen:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if chosen:
        trial.struck(f"SIGKILL {len(chosen)} dask workers", moment, process)
    return chosen


def replacements(driver: Process, killed: list[int]) -> list[int]:
    """Workers that are started in the place of others."""
    known, deadline = {*dask_workers(driver), *killed}, time.monotonic() + 20
    while driver.status is None and time.monotonic() < deadline:
        if fresh := [pid for pid in dask_workers(driver) if pid not in known]:
            return fresh
        time.sleep(0.01)
    return []


def one_line(process: Process) -> bool:
    """Whether a command that failed said why, and no more."""
    return len(process.said().splitlines()) == 1 and process.said().startswith("Error: ")


@dataclass
class Cluster:
    """A scheduler and a worker that are not the driver's: the surroundings of a trial."""

    trial: Trial
    port: int
    scheduler: Process | None = None
    worker: Process | None = None

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def start_scheduler(self) -> None:
        command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--no-dashboard"]
        self.scheduler = self.trial.start([*command, "--port", str(self.port)], "scheduler")

    def start_worker(self) -> None:
        command = [sys.executable, "-m", "distributed.cli.dask_worker", self.address, "--no-dashboard"]
        place = ["--nthreads", "3", "--local-directory", str(self.trial.folder)]
        self.worker = self.trial.start([*command, *place], "worker")

    def stop(self, *parts: Process | None) -> None:
        """All processes of a part at once, as when a node goes down."""
        for part in filter(None, parts):
            family = part.family()
            part.kill()
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextmanager
def cluster(trial: Trial) -> Iterator[Cluster]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = Cluster(trial, port)
    found.start_scheduler()
    found.start_worker()
    try:
        yield found
    finally:
        found.stop(found.worker, found.scheduler)


def kill_scheduler(trial: Trial) -> None:
    """The driver ends with one line; whoever runs the cluster starts it again, then the same command finishes."""
    with cluster(trial) as its:
        command = trial.command("--scheduler", its.address)
        driver = trial.start(command)
        moment = trial.moment("shard", "ledger", "pyramid", "sealing", "time")
        if not trial.reached(driver, moment):
            trial.expect(driver, 0)
            return
        its.stop(its.scheduler)
        killed = time.monotonic()
        trial.struck("SIGKILL scheduler", moment, driver)
        status = trial.expect(driver)
        trial.notes["seconds_to_stop"] = round(time.monotonic() - killed, 1)
        if status:
            if not one_line(driver):
                trial.problems.append(f"the driver did not end with one line: {driver.said()}")
            its.stop(its.worker)
            its.start_scheduler()
            its.start_worker()
            trial.finish(command)


def kill_cluster_worker(trial: Trial) -> None:
    """The process of a worker, which its nanny replaces, or its whole node, which comes back after a while."""
    with cluster(trial) as its:
        driver = trial.start(trial.command("--scheduler", its.address))
        for _ in range(trial.dice.randint(1, 2)):
            moment, whole, pause = (
                trial.moment("shard", "ledger", "time"),
                trial.dice.random() < 0.5,
                trial.dice.random(),
            )
            if not trial.reached(driver, moment):
                break
            assert its.worker is not None
            if whole:
                its.stop(its.worker)
                trial.struck("SIGKILL node", moment, driver)
                time.sleep(3 * pause)
                its.start_worker()
                continue
            for pid in dask_workers(its.worker):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                trial.struck("SIGKILL worker", moment, driver)
        trial.expect(driver, 0)


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
    return "strace is not allowed here" if _run("strace", "-f", "true", check=False) else ""


def stop_driver(trial: Trial) -> None:
    """SIGTERM or SIGINT: within seconds, with 75 once the run has begun."""
    number = trial.dice.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT))
    flags = trial.dice.choice(((), ("--workers", "2"), ("--executor", "dask")))
    command = trial.command(*flags)
    driver, moment = trial.start(command), trial.moment()
    if trial.reached(driver, moment):
        asked, began = time.monotonic(), running(trial.out)
        driver.send(number)
        status = driver.wait(30)
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


# --- Disks -----------------------------------------------------------------------------------------------------------

BALLAST = "ballast"


class Disk:
    """A small file system in memory, at the place of a trial's output."""

    def __init__(self, place: Path) -> None:
        self.place = place
        _run("mount", "-t", "tmpfs", "-o", f"size={DISK}", "emdvol", str(place))

    def fill(self, left: int) -> None:
        """All but ``left`` bytes, rounded down to what the file system counts in."""
        with suppress(OSError), (self.place / BALLAST).open("ab", buffering=0) as file:
            while True:
                free = os.statvfs(self.place)
                size = free.f_bavail * free.f_frsize - left
                if size <= 0 or not file.write(bytes(min(size, 1 << 20))):
                    return

    def free(self) -> None:
        (self.place / BALLAST).unlink(missing_ok=True)

    def read_only(self) -> None:
        """Refused while a file is open for writing, as it is half of the time."""
        deadline = time.monotonic() + 20
        while _run("mount", "-o", "remount,ro", str(self.place), check=False):
            if time.monotonic() > deadline:
                raise Failed("the file system never let itself be made read-only")

    def writable(self) -> None:
        _run("mount", "-o", "remount,rw", str(self.place))

    def close(self) -> None:
        _run("umount", "-l", str(self.place))


def _run(*command: str, check: bool = True) -> int:
    return subprocess.run(command, check=check, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


@contextmanager
def disk(trial: Trial) -> Iterator[Disk]:
    found = Disk(trial.out.parent)
    try:
        yield found
        trial.verdict()  # before it is gone
    finally:
        trial.end()
        found.close()


def no_disks() -> str:
    """Why file systems cannot be mounted here; empty where they can."""
    if os.geteuid():
        return "mounting a small file system needs root"
    with tempfile.TemporaryDirectory() as folder:
        try:
            Disk(Path(folder)).close()
        except (OSError, subprocess.CalledProcessError):
            return "file systems cannot be mounted here"
    return ""


def fill_disk(trial: Trial) -> None:
    """The disk is full for a moment, until the driver gives up, or while it is killed."""
    left = trial.dice.choice((0, 0, trial.dice.randrange(1 << 16)))
    with disk(trial) as its:
        _trouble(trial, "disk full", lambda: its.fill(left), its.free)


def protect_place(trial: Trial) -> None:
    """The place of the output is read-only for a moment, until the driver gives up, or while it is killed."""
    with disk(trial) as its:
        _trouble(trial, "read-only", its.read_only, its.writable)


def _trouble(trial: Trial, what: str, begin: Callable[[], None], mend: Callable[[], None]) -> None:
    """Drivers that are to give up do so after 3 s rather than a minute."""
    how = trial.dice.choice(("retried", "retried", "stopped", "killed"))
    tool = (sys.executable, "-c", IMPATIENT) if how == "stopped" else TOOL
    command = trial.command("--workers", str(trial.dice.choice((1, 2))), tool=tool)
    moment = choose_moment(trial.dice, trial.bench.seconds, seen=0.25)
    seconds = trial.dice.uniform(0.2, 6)
    driver = trial.start(command)
    if not trial.reached(driver, moment):
        trial.expect(driver, 0)
        return
    begin()
    trial.struck(f"{what}, {how}", moment, driver)
    if how == "stopped":
        status = trial.expect(driver, 0, 1, seconds=60)  # 0: there was nothing left to write
    else:
        deadline = time.monotonic() + seconds
        while driver.status is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if how == "killed":
            driver.kill()
    trial.inspect()
    mend()
    status = driver.wait() if how == "killed" else trial.expect(driver, 0, 1)
    if status:
        if how == "retried" and moment.event in ("shard", "ledger", "pyramid"):
            trial.problems.append(f"the driver did not wait for a moment: {driver.said()}")
        if status == 1 and not one_line(driver):
            trial.problems.append(f"the driver did not end with one line: {driver.said()}")
        trial.notes["ended"] = driver.said()[:200]
        trial.finish(command)


@dataclass(frozen=True)
class Kind:
    """share: of 22 trials. lacking: why it cannot be tried here, or nothing."""

    run: Callable[[Trial], None]
    share: int
    lacking: Callable[[], str] = lambda: ""


KINDS = {
    "driver": Kind(kill_driver, 4),
    "work": Kind(kill_work, 2),
    "two drivers": Kind(two_drivers, 2),
    "disk full": Kind(fill_disk, 2, no_disks),
    "read-only": Kind(protect_place, 2, no_disks),
    "system call": Kind(kill_at_system_call, 2, no_tracing),
    "signal": Kind(stop_driver, 1),
    "overwrite": Kind(replace_output, 1),
    "dask driver": Kind(kill_dask_driver, 2),
    "dask worker": Kind(kill_dask_worker, 2),
    "scheduler": Kind(kill_scheduler, 1),
    "cluster worker": Kind(kill_cluster_worker, 1),
}


def schedule(kinds: list[str], trials: int, seed: int) -> list[tuple[str, int]]:
    """Kinds in turn, each as often as its share, so that any hundred trials hold all of them."""
    rounds = max(KINDS[kind].share for kind in kinds)
    order = [kind for turn in range(rounds) for kind in kinds if turn < KINDS[kind].share]
    return [(kind, seed * 100_000 + number) for number, kind in enumerate(islice(cycle(order), trials))]


def attempt(bench: Bench, kind: str, seed: int) -> dict[str, Any]:
    """One trial -> what happened. ``problems`` is empty where all is well."""
    folder = bench.folder / f"{kind.replace(' ', '-')}-{seed}"
    trial, started = Trial(bench, kind, seed, folder), time.monotonic()
    trial.out.parent.mkdir(parents=True)
    try:
        KINDS[kind].run(trial)
        if not trial.judged:
            trial.verdict()
    except Failed as failed:
        trial.problems.append(str(failed))
    except Exception:  # of the harness or of a reader: a trial that cannot be judged is not passed
        trial.problems.append(traceback.format_exc())
    finally:
        trial.end()
    if not trial.problems:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "kind": kind,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "strikes": trial.strikes,
        "reruns": trial.reruns,
        **trial.notes,
        "result": "identical" if not trial.problems else "FAILED",
        **({"problems": trial.problems} if trial.problems else {}),
    }


def summarise(rows: list[dict[str, Any]], bench: Bench, left_out: dict[str, str]) -> dict[str, Any]:
    problems = [problem for row in rows for problem in row.get("problems", ())]
    by_kind = {
        kind: {
            "trials": len(own := [row for row in rows if row["kind"] == kind]),
            "identical": sum(row["result"] == "identical" for row in own),
            "strikes": sum(len(row["strikes"]) for row in own),
            "reruns": sum(row["reruns"] for row in own),
            "seconds": round(sum(row["seconds"] for row in own), 1),
        }
        for kind in KINDS
        if any(row["kind"] == kind for row in rows)
    }
    return {
        "made_by": "benchmarks/faults.py",
        "emdiffuse_vol": __version__,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "unbroken_seconds": round(bench.seconds, 1),
        "trials": len(rows),
        "identical": sum(row["result"] == "identical" for row in rows),
        "strikes": sum(len(row["strikes"]) for row in rows),
        "kills": sum("SIGKILL" in s["what"] or "killed" in s["what"] for row in rows for s in row["strikes"]),
        "trials_never_struck": sum(not row["strikes"] for row in rows),
        "lost": sum(problem.startswith("lost") for problem in problems),
        "corrupt": sum(problem.startswith(("corrupt", "recorded")) for problem in problems),
        "manual_steps": sum(not problem.startswith(("lost", "corrupt", "recorded")) for problem in problems),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "stages_struck": dict(Counter(_stage(s["state"]) for row in rows for s in row["strikes"])),
        "left_out": left_out,
        "by_kind": by_kind,
        "runs": rows,
    }


def _stage(state: str) -> str:
    """What was going on: the first stage that was not whole."""
    if ":" not in state:
        return state
    counts = [int(part.rpartition(":")[2]) for part in state.replace("level ", "level").split()]
    totals = (9, 5, 3)
    return next(
        (n for n, c, t in zip(("blocks", "level 1", "level 2"), counts, totals, strict=True) if c < t), "sealing"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("report", type=Path)
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--only", type=int, help="number of one trial, to see it again")
    asked = parser.parse_args()
    # Of a command in the background, shells make one that ignores SIGINT, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kinds = asked.kinds.split(",")
    left_out = {kind: why for kind in kinds if (why := KINDS[kind].lacking())}
    folder = Path(tempfile.mkdtemp(prefix="emdvol-faults-"))
    rows: list[dict[str, Any]] = []
    bench = Bench(folder)
    plan = schedule([kind for kind in kinds if kind not in left_out], asked.trials, asked.seed)
    for number, (kind, seed) in enumerate(plan):
        if asked.only not in (None, seed):
            continue
        rows.append(attempt(bench, kind, seed))
        row = rows[-1]
        hit = "; ".join(f"{s['what']} at {s['moment']} ({s['state']})" for s in row["strikes"])
        print(f"{number + 1}/{len(plan)} {kind} {seed}: {row['result']}, {row['seconds']} s, {hit}", flush=True)
        for problem in row.get("problems", ()):
            print(f"    {problem}", flush=True)
        # After each: what has been seen is kept, whatever becomes of the rest.
        asked.report.write_text(json.dumps(summarise(rows, bench, left_out), indent=2) + "\n")
    failed = [row for row in rows if row["result"] != "identical"]
    if failed:
        print(f"{len(failed)} of {len(rows)} trials failed; their folders are kept in {folder}")
    else:
        shutil.rmtree(folder)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
