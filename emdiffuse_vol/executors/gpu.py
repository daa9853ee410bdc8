"""One GPU for each worker process of a job: a preload module of dask workers.

Convention: the number at the end of a worker's name (``emdvol-3-1``, or 1) picks one of the GPUs that the job
sees. It must happen before torch looks for devices.
"""

from __future__ import annotations

import os
import re
from typing import Any

from emdiffuse_vol.executors import visible_gpus


def dask_setup(worker: Any) -> None:
    if gpu := gpu_of(str(worker.name)):
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def gpu_of(name: str) -> str | None:
    """None where there are no GPUs, or no number to choose by."""
    gpus, number = visible_gpus(), re.search(r"(\d+)$", name)
    return gpus[int(number[1]) % len(gpus)] if gpus and number else None
