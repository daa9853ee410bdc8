"""A block's life, in whatever process it happens: read, predict, write, and a receipt.

A ``BlockTask`` is small and can be sent anywhere; the volume, the output and the network it needs are opened once in
each process. That table, ``_contexts``, is the one piece of hidden state in the package: without it every block would
load the network again.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.models.checkpoints import load_weights
from emdiffuse_vol.reconstruct.greys import Codes, check_finite
from emdiffuse_vol.reconstruct.job import Job
from emdiffuse_vol.reconstruct.ledger import Receipt
from emdiffuse_vol.reconstruct.plan import Plan
from emdiffuse_vol.reconstruct.predict import Device, Predictor, Sampling, build_predictor, predict_block
from emdiffuse_vol.stores.blocks import write_block
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.volume import Volume, read_mirrored


@dataclass(frozen=True)
class Context:
    """What a process keeps for a job. ``turn`` is held while a network runs: ``permits`` of them at once."""

    job: Job
    plan: Plan
    predictor: Predictor
    turn: threading.Semaphore

    def predict(self, index: int, sections: NDArray[Any]) -> NDArray[Any]:
        """sections: greys of the block's ``read`` box, mirrored at the faces. Returns codes [2, z, y, x]."""
        block = self.plan[index]
        check_finite(sections, block.read)
        with self.turn:
            return predict_block(self.plan, block, self.predictor, sections, self.job.grey_map, self.job.scale)

    @cached_property
    def volume(self) -> Volume:
        return open_volume(self.job.input, **self.job.input_options)


@dataclass(frozen=True)
class BlockTask:
    """permits: networks at once in one process; threads: cores that each may use."""

    job: Job
    permits: int
    threads: int

    def __call__(self, index: int) -> Receipt:
        started = time.perf_counter()
        context = context_for(self.job, self.permits, self.threads)
        block = context.plan[index]
        codes = context.predict(index, read_mirrored(context.volume, block.read))
        write_block(Path(self.job.out), block.write.shift(context.plan.offset), codes)
        step = Codes(str(codes.dtype)).step
        p99, mean = float(np.percentile(codes[1], 99)) * step, float(codes[1].mean(dtype=np.float64)) * step
        return Receipt(index, time.perf_counter() - started, p99, mean)


def context_for(job: Job, permits: int = 1, threads: int | None = None) -> Context:
    with _lock:
        if (key := f"{permits} {threads} {job.key}") not in _contexts:
            _contexts.clear()  # a process works for one run at a time
            _contexts[key] = _open(job, permits, threads)
        return _contexts[key]


def _open(job: Job, permits: int, threads: int | None) -> Context:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if job.device != "cpu":
        # The same bits in every process, and float32 that is float32 (cuDNN's default rounds to tf32).
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
    plan = job.plan
    sampling = Sampling(job.members, job.seed, job.sampler, job.steps, job.tile)
    predictor = build_predictor(load_weights(job.weights).net, plan.mode, sampling, Device(job.device, job.precision))
    return Context(job, plan, predictor, threading.Semaphore(permits))


_contexts: dict[str, Context] = {}
_lock = threading.Lock()
