"""Tasks on a dask cluster of processes on this machine.

One future per task, a few in flight for each worker: the scheduler never holds more than the window. Each worker
process runs one network at a time and has two threads more, so that reading and writing overlap it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from emdiffuse_vol.errors import BlockError
from emdiffuse_vol.executors import Task, available_cores
from emdiffuse_vol.executors.local import AHEAD


class DaskExecutor:
    def __init__(self, workers: int) -> None:
        import dask
        from distributed import Client, LocalCluster

        self.workers = workers
        self.threads = max(1, available_cores() // workers)
        # Blocks hold large arrays by design; the plan has checked that they fit, so workers are not paused for it.
        limits: dict[str, Any] = {
            f"distributed.worker.memory.{key}": False for key in ("target", "spill", "pause", "terminate")
        }
        with dask.config.set(limits):
            self.cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1 + AHEAD,
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.ERROR,
                memory_limit=0,
            )
        self.client = Client(self.cluster)

    def run(self, task: Task, numbers: Iterable[int]) -> Iterator[Any]:
        from distributed import as_completed
        from distributed.scheduler import KilledWorker

        rest = iter(numbers)

        def submit(count: int) -> list[Any]:
            return [self.client.submit(task, n, pure=False) for n in islice(rest, count)]

        futures = as_completed(submit(self.workers * (1 + AHEAD)))
        for future in futures:
            try:
                result = future.result()
            except KilledWorker as error:
                raise BlockError(f"worker processes died again and again at one block: {error}") from error
            future.release()
            for new in submit(1):
                futures.add(new)
            yield result

    def close(self) -> None:
        self.client.close()
        self.cluster.close()
