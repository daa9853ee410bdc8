"""Trials of dask clusters: of the driver's own, and of one that somebody else runs."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from striking.moments import Moment
from striking.outputs import look_at
from striking.processes import LIMIT, Process, dask_workers, one_line
from striking.trial import Trial


def kill_dask_driver(trial: Trial) -> None:
    """The driver of a dask cluster on this machine; its workers must go by themselves."""
    command = trial.command("--executor", "dask", "--workers", str(trial.dice.choice((1, 2))))
    trial.kill_and_finish(command, trial.dice.randint(1, 2))


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
    known, deadline = {*dask_workers(driver), *killed}, time.monotonic() + LIMIT
    while driver.status is None and time.monotonic() < deadline:
        if fresh := [pid for pid in dask_workers(driver) if pid not in known]:
            return fresh
        time.sleep(0.01)
    return []


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
