"""Where tasks run.

Convention: an executor pulls task numbers from an iterator through a bounded window, so a million tasks cost nothing
until they run, and yields what each task returns, in the order they finish. Tasks do not depend on each other and may
run more than once. The first task that raises ends the run: tasks in flight finish or are dropped, and the error is
raised.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

Task = Callable[[int], Any]


class Executor(Protocol):
    """``workers`` networks run at once, each in ``threads`` of the machine's cores."""

    workers: int
    threads: int

    def run(self, task: Task, numbers: Iterable[int]) -> Iterator[Any]: ...

    def close(self) -> None: ...


def available_cores() -> int:
    """Cores this process may use: fewer than the machine has under SLURM or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_executor(name: str, workers: int) -> Executor:
    """name: a key of EXECUTORS. The module of an executor is imported when it is asked for."""
    return EXECUTORS[name](workers)


def _local(workers: int) -> Executor:
    from emdiffuse_vol.executors.local import LocalExecutor

    return LocalExecutor(workers)


def _dask(workers: int) -> Executor:
    from emdiffuse_vol.executors.dask import DaskExecutor

    return DaskExecutor(workers)


EXECUTORS: dict[str, Callable[[int], Executor]] = {"local": _local, "dask": _dask}
