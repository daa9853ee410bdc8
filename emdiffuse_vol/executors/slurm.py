"""Tasks on SLURM jobs that are started, watched and replaced through dask-jobqueue.

Convention: a job runs one worker process for each of its GPUs (or ``processes``), which share its cores. Each job
tells its workers when it will end, so that none starts a block it could not finish. Jobs that end, by their walltime,
a scancel, a preemption or a dead node, are replaced until the run is done; one that is requeued is replaced as well,
and cancelled, because it may wait for long.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from emdiffuse_vol.errors import ClusterError, ConfigError
from emdiffuse_vol.executors import AHEAD

if TYPE_CHECKING:
    from emdiffuse_vol.executors.dask import DaskExecutor

WALLTIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d)")
GPU = re.compile(r"(?:^|,)gpu(?::(?!\d+(?:[,(]|$))[^:,(]+)?(?::(?P<count>\d+))?(?:\([^)]*\))?(?=,|$)")

# States of a job that will bring workers, or has them.
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "RESIZING")
AT_ONCE = 16  # sbatch commands
FIRST_LOOK, LAST_LOOK = 1.0, 30.0  # seconds between two looks at the queue while workers are missing
ABSENT = 60.0  # seconds after which a job that has lost its workers is given up, whatever SLURM says of it
BARREN = 5  # looks that find jobs ended before they brought a worker, after which the run stops


@dataclass(frozen=True)
class Slurm:
    """Keys of the JSON file of ``--cluster``: ``jobs`` jobs, each with ``gres`` (such as gpu:2), ``cores``, ``memory``
    and ``walltime`` (HH:MM:SS or D-HH:MM:SS); ``processes`` is the number of workers in a job where it is not that of
    its GPUs; ``prologue`` are lines of shell before the workers start, ``extra`` further options of sbatch;
    ``interface`` is the network that nodes reach this machine by."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    jobs: int = 1
    cores: int = 4
    memory: str = "16GB"
    walltime: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    gres: str | None = None
    processes: int | None = None
    interface: str | None = None
    python: str | None = None
    log_directory: str | None = None
    prologue: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        """GPUs of a job: "gpu:2", "gpu:a100:2" or "gpu"."""
        return sum(int(found["count"] or 1) for found in GPU.finditer(self.gres or ""))

    @property
    def workers(self) -> int:
        """Worker processes of a job."""
        return self.gpus or 1 if self.processes is None else self.processes

    @property
    def seconds(self) -> int:
        """Walltime of a job."""
        found = WALLTIME.fullmatch(self.walltime)
        if found is None:
            raise ConfigError(f"cluster.walltime is {self.walltime!r}, expected HH:MM:SS or D-HH:MM:SS")
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def memory_bytes(self) -> int:
        from dask.utils import parse_bytes

        try:
            return int(parse_bytes(self.memory))
        except ValueError:
            raise ConfigError(f"cluster.memory is {self.memory!r}, expected a size such as 64GB") from None

    def check(self) -> None:
        """Raises ConfigError for what no cluster could give."""
        for name, value in {"jobs": self.jobs, "cores": self.cores, "processes": self.workers}.items():
            if value < 1:
                raise ConfigError(f"cluster.{name} is {value}; at least 1 is needed")
        if self.cores < self.workers:
            raise ConfigError(f"cluster.cores is {self.cores} for {self.workers} workers in a job; give one core each")
        if self.seconds < 1 or self.memory_bytes < 1:
            raise ConfigError("cluster.walltime and cluster.memory must be above 0")


def make_cluster(slurm: Slurm) -> Any:
    """A dask-jobqueue cluster without jobs. Raises ClusterError where it cannot be."""
    try:
        from dask_jobqueue.slurm import SLURMCluster
    except ModuleNotFoundError as error:
        raise ClusterError("--cluster needs dask-jobqueue; pip install 'emdiffuse_vol[slurm]'") from error
    import dask

    from emdiffuse_vol.executors.dask import GPU_PRELOAD, SETTINGS

    # Jobs are given up by the Keeper, which knows better than dask whether they live.
    dask.config.set({**SETTINGS, "distributed.deploy.lost-worker-timeout": "1 hour"})
    try:
        return SLURMCluster(
            queue=slurm.partition,
            account=slurm.account,
            walltime=slurm.walltime,
            memory=slurm.memory,
            job_cpu=slurm.cores,
            cores=slurm.workers * (1 + AHEAD),  # threads of dask's, not of the network's
            processes=slurm.workers,
            interface=slurm.interface,
            python=slurm.python or sys.executable,
            job_name="emdvol",
            job_script_prologue=[
                "export EMDVOL_BEGIN=$(date +%s)",
                f"export EMDVOL_DEADLINE=$((EMDVOL_BEGIN + {slurm.seconds}))",
                *slurm.prologue,
            ],
            job_extra_directives=[*([f"--gres={slurm.gres}"] if slurm.gres else []), *slurm.extra],
            # SLURM itself watches the memory of a job.
            worker_extra_args=["--preload", GPU_PRELOAD, "--memory-limit", "0", "--no-dashboard"],
            # Workers whose driver was killed do not wait for it for long; the next driver starts its own.
            death_timeout=60,
            log_directory=slurm.log_directory,
            scheduler_options={"dashboard_address": ":0"},
            silence_logs=logging.CRITICAL,
        )
    except RuntimeError as error:  # a network interface that is none
        raise ClusterError(f"no scheduler can be started here: {error}; see interface in --cluster") from error


class Keeper:
    """Keeps a number of jobs in the queue or running, as long as its cluster runs.

    ``adapt`` of dask-jobqueue would replace only jobs of a single process whose worker had come and gone: not those
    of several GPUs, and none that ended before its workers came. Its coroutines run in the cluster's event loop.
    """

    def __init__(self, cluster: Any, slurm: Slurm) -> None:
        self.cluster, self.slurm = cluster, slurm
        self.numbers = count()  # no two jobs have one name
        self.seen: dict[str, float] = {}  # when jobs, by name, last had a worker
        self.barren = 0
        self.said = ""  # by SLURM, of the last job that it refused
        self.error: ClusterError | None = None

    def check(self, workers: Collection[str]) -> None:
        """Raises ClusterError where jobs bring no workers."""
        if self.error:
            raise self.error

    async def fill(self) -> None:
        """Submit what is missing. Raises ClusterError with SLURM's own words where it refuses."""
        spec = self.cluster.worker_spec
        while self.cluster.status.name == "running":
            for _ in range(min(AT_ONCE, self.slurm.jobs - len(spec))):
                spec[f"emdvol-{next(self.numbers)}"] = self.cluster.new_spec
            try:
                await self.cluster._correct_state()  # of ``scale``, nobody hears the errors
            except RuntimeError as error:
                self.said = _words(str(error))
                raise ClusterError(f"SLURM does not take the jobs of --cluster: {self.said}; correct that") from error
            self.said = ""
            if len(spec) >= self.slurm.jobs:
                return

    async def keep(self) -> None:
        """Look at the queue while workers are missing, often at first, and replace jobs that are gone."""
        here, pause, due = set[str](), FIRST_LOOK, 0.0
        while self.cluster.status.name == "running" and self.error is None:
            await asyncio.sleep(FIRST_LOOK)
            before, here = here, self.here()
            self.seen.update(dict.fromkeys(here, time.monotonic()))
            if here - before:
                self.barren = 0
            if here != before:
                pause, due = FIRST_LOOK, 0.0
            if len(here) < self.slurm.jobs and time.monotonic() >= due:
                await self.look(here)
                due, pause = time.monotonic() + pause, min(2 * pause, LAST_LOOK)

    def here(self) -> set[str]:
        """Names of jobs that have workers."""
        present = {str(worker.name) for worker in self.cluster.scheduler.workers.values()}
        return {
            name
            for name, spec in self.cluster.worker_spec.items()
            if present & {f"{name}{suffix}" for suffix in spec.get("group", [""])}
        }

    async def look(self, here: set[str]) -> None:
        states = await self._queue()
        if states is None:
            return
        gone = [
            name
            for name, job in self.cluster.workers.items()
            if name not in here and self._is_gone(name, states.get(str(job.job_id)))
        ]
        if any(name not in self.seen for name in gone):
            self.barren += 1
        for name in gone:
            self.cluster.worker_spec.pop(name, None)
            self.seen.pop(name, None)
        if self.barren >= BARREN and not here:
            logs = self.slurm.log_directory or f"{os.getcwd()}/slurm-*.out"
            why = f"SLURM says: {self.said}" if self.said else f"see {logs}; is python, prologue or interface wrong?"
            self.error = ClusterError(f"jobs of --cluster end before their workers arrive; {why}")
            return
        try:
            await self.fill()
        except ClusterError:  # for now, perhaps: another look follows
            return

    def _is_gone(self, name: str, state: str | None) -> bool:
        if state not in ALIVE:
            return True
        last = self.seen.get(name)
        return last is not None and (state == "PENDING" or time.monotonic() > last + ABSENT)

    async def _queue(self) -> dict[str, str] | None:
        """State of each job of this user; None where SLURM does not answer."""
        command = ("squeue", "--noheader", "--user", str(os.getuid()), "--format", "%A %T")
        try:
            asked = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
        except OSError:
            return None
        try:
            said, _ = await asked.communicate()
        except asyncio.CancelledError:  # the cluster closes; it must not outlive the loop
            asked.kill()
            await asked.wait()
            raise
        return None if asked.returncode else dict(line.split() for line in said.decode().splitlines())


def _words(text: str) -> str:
    """Of an error of dask-jobqueue, what sbatch said."""
    lines = text.partition("stderr:\n")[2].split("\n") if "stderr:\n" in text else [text]
    said = [re.sub(r"^sbatch: (error: |fatal: )?", "", line).strip() for line in lines]
    return "; ".join(line for line in said if line)


def on_slurm(slurm: Slurm) -> DaskExecutor:
    """Raises ClusterError where SLURM is not here or refuses the jobs."""
    from distributed import Client

    from emdiffuse_vol.executors.dask import DaskExecutor

    slurm.check()
    if shutil.which("sbatch") is None:
        raise ClusterError("there is no sbatch on this machine; run where SLURM is, or leave out --cluster")
    cluster = make_cluster(slurm)
    keeper = Keeper(cluster, slurm)
    threads = max(1, slurm.cores // slurm.workers)
    executor = DaskExecutor(Client(cluster, set_as_default=False), cluster, threads=threads, watch=keeper.check)
    try:
        cluster.sync(keeper.fill)
        cluster.loop.add_callback(keeper.keep)
    except BaseException:
        executor.close()
        raise
    return executor
