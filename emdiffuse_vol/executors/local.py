"""Tasks in threads of this process.

Two threads more than networks: while one task computes, another reads its input and a third writes its result. Tasks
take turns at the network by themselves (see ``reconstruct.worker``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

from emdiffuse_vol.executors import Task, available_cores

AHEAD = 2


class LocalExecutor:
    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.threads = max(1, available_cores() // workers)

    def run(self, task: Task, numbers: Iterable[int]) -> Iterator[Any]:
        rest = iter(numbers)
        slots = self.workers + AHEAD
        with ThreadPoolExecutor(slots, thread_name_prefix="block") as pool:
            running: set[Future[Any]] = {pool.submit(task, n) for n in islice(rest, slots)}
            try:
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    running |= {pool.submit(task, n) for n in islice(rest, len(done))}
                    for future in done:
                        yield future.result()
            finally:
                for future in running:
                    future.cancel()

    def close(self) -> None:
        pass
