"""Tasks on dask workers: processes on this machine, of a scheduler that runs already, or (``slurm``) of SLURM jobs.

One future per task, and only the few in flight: the scheduler never holds more than the window. Each worker process
runs one network at a time and has threads for reading and writing beside it. A worker that dies costs no more than
the tasks it had: the scheduler gives them to another. One whose time is up takes no more, ends those it has and goes.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import pkgutil
import threading
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

from emdiffuse_vol.errors import ClusterError
from emdiffuse_vol.executors import AHEAD, Outcome, Task, available_cores, visible_gpus
from emdiffuse_vol.executors.local import drain
from emdiffuse_vol.executors.walltime import OutOfTime

GPU_PRELOAD = "emdiffuse_vol.executors.gpu"
CONNECT = 15.0  # seconds for a scheduler to answer
ASK = 1.0  # seconds for which an answer about the workers holds
GOODBYE = 5.0  # seconds for a client, a cluster or a worker to close

# Blocks hold large arrays by design; the plan has checked that they fit, so workers are not paused for it.
MEMORY_LIMITS = tuple(f"distributed.worker.memory.{key}" for key in ("target", "spill", "pause", "terminate"))
SETTINGS: dict[str, Any] = {
    **dict.fromkeys(MEMORY_LIMITS, False),
    "distributed.worker.preload": [GPU_PRELOAD],
    "distributed.comm.timeouts.connect": CONNECT,
    # A network holds the interpreter for long stretches: minutes of silence are no death.
    "distributed.scheduler.worker-ttl": "15 minutes",
}


class DaskExecutor:
    """client, cluster: of ``distributed``; cluster None where it belongs to somebody else. threads, renewable: see
    ``Executor``. watch: told now and then the addresses of workers; raises ClusterError where they are of no use."""

    permits = 1

    def __init__(
        self,
        client: Any,
        cluster: Any = None,
        *,
        threads: int | None = None,
        renewable: bool = True,
        watch: Callable[[Collection[str]], None] = lambda workers: None,
    ) -> None:
        self.client, self.cluster = client, cluster
        self.threads, self.renewable, self._watch = threads, renewable, watch
        self.link: str | None = client.dashboard_link or None
        self._ended: SimpleQueue[Outcome] = SimpleQueue()
        self._futures: dict[int, Any] = {}
        self._asked, self._processes, self._lost = 0.0, 0, False

    def processes(self) -> int:
        if time.monotonic() > self._asked + ASK:
            try:
                workers = self.client.sync(self.client.scheduler.ncores_running)
            except Exception as error:  # whatever the state the connection is in
                raise self._gone() from error
            self._watch(workers)
            self._processes = len(workers)
            self._asked = time.monotonic()
        return self._processes

    def submit(self, task: Task, number: int) -> None:
        try:
            future = self.client.submit(run_here, task, number, self.renewable, pure=False)
        except Exception as error:
            raise self._gone() from error
        self._futures[number] = future
        future.add_done_callback(partial(self._end, number))

    def wait(self, seconds: float) -> list[Outcome]:
        outcomes = drain(self._ended, seconds)
        for outcome in outcomes:
            self._futures.pop(outcome.number, None)
        self.processes()  # nothing else tells of a scheduler that is gone
        return outcomes

    def _gone(self) -> ClusterError:
        self._lost = True
        return ClusterError(
            f"the scheduler at {self.client.scheduler.address} is gone; start it, then the same command again"
        )

    def _end(self, number: int, future: Any) -> None:
        """Runs in a thread of dask's."""
        try:
            outcome = Outcome(number, *future.result(timeout=60))
        except Exception as error:  # the task's own come back as results: this is of the way there, or back
            if _unloadable(error):
                error = ClusterError(
                    f"workers cannot load blocks: {error}; give scheduler and workers the driver's environment"
                )
            outcome = Outcome(number, error=error, lost=not isinstance(error, ClusterError))
        self._ended.put(outcome)
        future.release()

    def close(self) -> None:
        _hush()
        closing = [] if self._lost else [partial(self.client.cancel, list(self._futures.values()), force=True)]
        closing += [partial(part.close, timeout=GOODBYE) for part in (self.client, self.cluster) if part is not None]
        for close in closing:
            thread = threading.Thread(target=_quietly, args=(close,), daemon=True)
            thread.start()
            thread.join(2 * GOODBYE)


def _hush() -> None:
    """Of a scheduler that is lost, and of what is abandoned, dask shows tracebacks; our errors are one line."""
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _unloadable(error: Exception) -> bool:
    return isinstance(error, ImportError | AttributeError | pickle.UnpicklingError) or "deserialization" in str(error)


def _quietly(close: Callable[[], Any]) -> None:
    with suppress(Exception):  # of a connection that is gone already
        close()


def run_here(task: Task, number: int, renewable: bool) -> tuple[Any, Exception | None, str]:
    """Called in a worker -> the result, the error and its trace. To dask an error is a result too."""
    try:
        return task(number), None, ""
    except Exception as error:
        if isinstance(error, OutOfTime) and renewable:
            from distributed import get_worker

            worker = get_worker()
            worker.loop.add_callback(_leave, worker)
        return None, _portable(error), traceback.format_exc()


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


async def _leave(worker: Any) -> None:
    """Take no more tasks, end those that run, then go. Dask's own ways to retire a worker do not wait for tasks."""
    from distributed.core import Status

    if worker.status is not Status.running:
        return  # it is leaving
    worker.status = Status.closing_gracefully
    while worker.state.executing:
        await asyncio.sleep(0.1)
    for _ in range(int(GOODBYE / 0.1)):
        if not worker.data:  # results, until they have been fetched
            break
        await asyncio.sleep(0.1)
    # Removed in this way, it is not suspected of having died of the tasks that still wait here.
    await worker.scheduler.retire_workers(workers=[worker.address], close_workers=False, remove=True)
    await worker.close(reason="out of time")


def on_this_machine(workers: int | None) -> DaskExecutor:
    """workers: processes; None: one for each GPU, or one. Raises ClusterError where they do not start."""
    import dask
    from distributed import Client, LocalCluster

    workers = workers or len(visible_gpus()) or 1
    # Dask would give up a worker that died when its replacement takes longer to start; the replacement always comes.
    dask.config.set(SETTINGS | {"distributed.deploy.lost-worker-timeout": "1 day"})
    try:
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1 + AHEAD,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            memory_limit=0,
        )
    except RuntimeError as error:  # a process was killed, or met with something in its surroundings
        raise ClusterError(f"a dask worker ended as it started ({error}); the same command starts it again") from error
    # Their time is up when that of this process is.
    return DaskExecutor(
        Client(cluster, set_as_default=False), cluster, threads=max(1, available_cores() // workers), renewable=False
    )


def on_scheduler(address: str, version: str) -> DaskExecutor:
    """version: of this package, which workers must have. Raises ClusterError where no scheduler answers."""
    import dask
    from distributed import Client

    dask.config.set(SETTINGS)
    _hush()
    try:
        client = Client(address, timeout=CONNECT, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise ClusterError(
            f"no dask scheduler answers at {address}, expected such as tcp://host:8786; start it or correct it"
        ) from error
    known: set[str] = set()

    def check(workers: Collection[str]) -> None:
        """Raises ClusterError where a worker lacks this package, or has another version."""
        found = _versions(client, [worker for worker in workers if worker not in known])
        known.update(found)
        for worker, other in found.items():
            if other != version:
                raise ClusterError(
                    f"the worker at {worker} has emdiffuse_vol {other}, the driver {version}; "
                    f"give both the same environment"
                )

    return DaskExecutor(client, watch=check)


def _versions(client: Any, workers: list[str]) -> dict[str, str]:
    """Of this package, where workers answer. Sent a block, one that lacks it would only die, without a word."""
    if not workers:
        return {}
    answers = client.run(pkgutil.resolve_name, "emdiffuse_vol:__version__", workers=workers, on_error="return")
    return {
        worker: f"not ({answer})" if isinstance(answer, Exception) else answer
        for worker, answer in answers.items()
        if not isinstance(answer, OSError)
    }
