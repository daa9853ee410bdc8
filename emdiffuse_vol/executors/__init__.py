"""Where tasks run.

Convention: a task is called with a number; only the number, and what the task returns, travel. The caller decides
what runs and keeps a few tasks in flight for each process (see :func:`capacity`), so a million tasks cost nothing
until they run. An executor neither orders nor repeats tasks: it says how each one ended, in the order they end. Tasks
do not depend on each other and may run more than once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Task = Callable[[int], Any]

# Tasks in a process beside those whose network runs: one reads its input, one writes its result.
AHEAD = 2


@dataclass(frozen=True)
class Outcome:
    """How a task ended: with a ``result``, with an ``error`` and its ``trace``, or ``lost`` with its process."""

    number: int
    result: Any = None
    error: Exception | None = None
    trace: str = ""
    lost: bool = False


class Executor(Protocol):
    """``permits``: networks at once in one process. ``threads``: cores that each may use; None: those the worker was
    given. ``link``: where its state can be watched. ``renewable``: a process that leaves is replaced by another."""

    @property
    def permits(self) -> int: ...

    @property
    def threads(self) -> int | None: ...

    @property
    def link(self) -> str | None: ...

    @property
    def renewable(self) -> bool: ...

    def processes(self) -> int:
        """Processes that can take tasks now; workers of a cluster come and go."""
        ...

    def submit(self, task: Task, number: int) -> None: ...

    def wait(self, seconds: float) -> list[Outcome]:
        """What has ended since the last call; waits up to ``seconds`` for the first. Raises ClusterError when nothing
        can come any more."""
        ...

    def close(self) -> None:
        """Abandon what is in flight and let the workers go, within seconds."""
        ...


def capacity(executor: Executor) -> int:
    """Tasks worth having in flight now."""
    return executor.processes() * (executor.permits + AHEAD)


def available_cores() -> int:
    """Cores this process may use: fewer than the machine has under SLURM or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Names, for CUDA_VISIBLE_DEVICES, of the GPUs this process may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))


EXECUTORS = {
    "local": "threads of this process",
    "dask": "processes on this machine, one for each GPU",
    "scheduler": "the workers of a dask scheduler that runs",
    "slurm": "SLURM jobs, started and replaced as needed",
}
