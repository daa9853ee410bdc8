"""Tasks in threads of this process.

While one task computes, another reads its input and a third writes its result: tasks take turns at the network by
themselves (see ``reconstruct.worker``).
"""

from __future__ import annotations

import threading
import traceback
from queue import Empty, SimpleQueue
from typing import TypeVar

from emdiffuse_vol.executors import AHEAD, Outcome, Task, available_cores

T = TypeVar("T")
THREAD = "block"  # name of the threads, for whoever ends the process


class LocalExecutor:
    link = None
    renewable = False

    def __init__(self, workers: int) -> None:
        self.permits = workers
        self.threads = max(1, available_cores() // workers)
        self._todo: SimpleQueue[tuple[Task, int] | None] = SimpleQueue()
        self._ended: SimpleQueue[Outcome] = SimpleQueue()
        # Daemons: a block that computes for minutes must not keep a process alive that was told to end.
        self._threads = [threading.Thread(target=self._work, name=THREAD, daemon=True) for _ in range(workers + AHEAD)]
        for thread in self._threads:
            thread.start()

    def processes(self) -> int:
        return 1

    def submit(self, task: Task, number: int) -> None:
        self._todo.put((task, number))

    def wait(self, seconds: float) -> list[Outcome]:
        return drain(self._ended, seconds)

    def close(self) -> None:
        drain(self._todo, 0)
        for _ in self._threads:
            self._todo.put(None)

    def _work(self) -> None:
        while (item := self._todo.get()) is not None:
            task, number = item
            try:
                outcome = Outcome(number, task(number))
            except Exception as error:
                outcome = Outcome(number, error=error, trace=traceback.format_exc())
            self._ended.put(outcome)


def drain(queue: SimpleQueue[T], seconds: float) -> list[T]:
    """All that is in a queue; waits up to ``seconds`` where it is empty."""
    found = []
    try:
        found.append(queue.get(timeout=seconds) if seconds > 0 else queue.get_nowait())
        while True:
            found.append(queue.get_nowait())
    except Empty:
        return found
