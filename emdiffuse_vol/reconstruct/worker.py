"""A block's life, in whatever process it happens: read, predict, write, and a receipt.

A ``BlockTask`` is small and can be sent anywhere; the volume, the output and the network it needs are opened once in
each process. That table, ``_contexts``, is the one piece of hidden state in the package: without it every block would
load the network again. A process holds a few blocks at a time: ``permits`` of them at their network, ``AHEAD`` more
being read or written.
"""

from __future__ import annotations

import platform
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import ClusterError, ConfigError
from emdiffuse_vol.executors import AHEAD
from emdiffuse_vol.executors.local import THREAD
from emdiffuse_vol.executors.walltime import check_time
from emdiffuse_vol.models.checkpoints import Weights, load_weights
from emdiffuse_vol.reconstruct.device import Device
from emdiffuse_vol.reconstruct.empty import Emptiness, empty_codes, open_emptiness
from emdiffuse_vol.reconstruct.greys import Codes, check_finite
from emdiffuse_vol.reconstruct.job import Job, differences
from emdiffuse_vol.reconstruct.ledger import BRIDGED, DONE, SKIPPED, Receipt, checksum
from emdiffuse_vol.reconstruct.plan import Block, Plan
from emdiffuse_vol.reconstruct.predict import Predictor, predict_block
from emdiffuse_vol.reconstruct.predictors import Sampling, build_predictor
from emdiffuse_vol.reconstruct.software import software
from emdiffuse_vol.reconstruct.source import open_input
from emdiffuse_vol.stores.image import finish, open_array, write_units
from emdiffuse_vol.stores.kvstore import bytes_read
from emdiffuse_vol.stores.metadata import read_attributes, stamp
from emdiffuse_vol.stores.volume import Volume, read_mirrored

if TYPE_CHECKING:
    from tensorstore import Future, TensorStore


@dataclass
class Context:
    """What a process keeps for a job. ``seats``: blocks in the process; ``networks``: threads of their own for as many
    networks as run at once, since torch and the allocator keep memory for each thread that has ever run one."""

    job: Job
    plan: Plan
    predictor: Predictor
    seats: threading.Semaphore
    networks: ThreadPoolExecutor
    counted: int = 0
    checked: tuple[int, ...] = ()  # of the output's metadata, when they were last found to be this job's

    def predict(self, index: int, sections: NDArray[Any]) -> NDArray[Any]:
        """sections: greys of the block's ``read`` box, mirrored at the faces. Returns codes [2, z, y, x]."""
        block, job = self.plan[index], self.job
        check_finite(sections, block.read)
        fills = self.emptiness.fills(block, sections)
        predicted = self.networks.submit(
            predict_block, self.plan, block, self.predictor, sections, job.grey_map, job.scales, fills, job.section_map
        )
        return predicted.result()

    @cached_property
    def volume(self) -> Volume:
        return open_input(self.job)

    @cached_property
    def emptiness(self) -> Emptiness:
        return open_emptiness(self.job)

    @cached_property
    def target(self) -> TensorStore:
        return open_array(self.job.out, 0, "w")

    def check_output(self) -> None:
        """Raises ConfigError where the output was replaced: workers of a scheduler go on after their driver's end."""
        path = Path(self.job.out)
        if (found := stamp(path)) == self.checked:
            return
        fingerprint = read_attributes(path).get("emdvol", {}).get("fingerprint")
        if fingerprint is not None and (unlike := differences(fingerprint, self.job.fingerprint())):
            raise ConfigError(f"{path} belongs to another run by now: {'; '.join(unlike)}; nothing was written")
        self.checked = found

    def newly_read(self) -> int:
        """Bytes that this process has read from stores since it was last asked."""
        with _lock:
            before, self.counted = self.counted, bytes_read()
            return self.counted - before


@dataclass(frozen=True)
class BlockTask:
    """permits: networks at once in one process; threads: cores that each may use, None for all of the process's;
    expected: seconds that a block takes, 0 where nobody knows; driver: its software."""

    job: Job
    permits: int
    threads: int | None
    expected: float = 0.0
    driver: dict[str, str] = field(default_factory=software)

    def __call__(self, index: int) -> Receipt:
        check_time(self.expected)
        check_software(self.driver)
        context = context_for(self.job, self.permits, self.threads)
        with context.seats:
            started = time.perf_counter()
            receipt = self.make(context, context.plan[index])
            return Receipt(index, time.perf_counter() - started, read_bytes=context.newly_read(), **receipt)

    def make(self, context: Context, block: Block) -> dict[str, Any]:
        """What is known of the block once it is on disk, as fields of its receipt."""
        grey = context.emptiness.whole(block)
        if grey is None:
            sections = read_mirrored(context.volume, block.read)
            grey = context.emptiness.whole(block, sections)
        if grey is not None:
            if grey:  # where nothing is written, all is 0
                finish(self.write(block, context, empty_codes(block, grey, context.volume.spec.dtype)))
            return {"state": SKIPPED}
        batch, step = context.predictor.batch, Codes(context.volume.spec.dtype).step
        codes = self.codes(context, block, sections)
        written = self.write(block, context, codes)
        p99, mean = statistics(codes[1])
        known = {"p99": p99 * step, "mean": mean * step, "checksum": checksum(codes)}
        finish(written)
        lowered = context.predictor.batch if context.predictor.batch < batch else None
        state = BRIDGED if context.plan.bridged(block) else DONE
        return {"state": state, "batch": lowered, **known}

    def codes(self, context: Context, block: Block, sections: NDArray[Any]) -> NDArray[Any]:
        """[2, z, y, x] of ``block.write``, as stored. sections: greys of ``block.read``."""
        return context.predict(block.index, sections)

    def write(self, block: Block, context: Context, codes: NDArray[Any]) -> Future[None]:
        """Starts to; on disk when :func:`finish` returns."""
        context.check_output()
        return write_units(context.target, block.write.shift(context.plan.offset), codes)


def statistics(codes: NDArray[Any]) -> tuple[float, float]:
    """99th percentile (the smallest value that 99 % do not exceed) and mean of uncertainty codes."""
    if codes.dtype == np.float32:
        return float(np.percentile(codes, 99, method="inverted_cdf")), float(codes.mean(dtype=np.float64))
    import torch

    # Codes of whole numbers, 0 and above: counting them is many times faster than sorting. Torch does not hold the
    # interpreter meanwhile, as numpy does.
    counts = np.zeros(np.iinfo(codes.dtype).max + 1, np.int64)
    for planes in np.array_split(codes, range(16, len(codes), 16)):
        values = np.ascontiguousarray(planes, np.uint8 if codes.dtype == np.uint8 else np.int32)
        counts += torch.bincount(torch.from_numpy(values).ravel(), minlength=len(counts)).numpy()
    p99 = int(np.searchsorted(np.cumsum(counts), 0.99 * codes.size))
    return float(p99), float(counts @ np.arange(len(counts)) / codes.size)


def check_software(driver: dict[str, str]) -> None:
    """Raises ClusterError where this process has other versions than the driver."""
    here = software()
    unlike = [
        f"{name} {here.get(name)}, the driver {driver[name]}" for name in driver if here.get(name) != driver[name]
    ]
    if unlike:
        raise ClusterError(f"the worker on {platform.node()} has {'; '.join(unlike)}; give both the same environment")


def context_for(job: Job, permits: int = 1, threads: int | None = None) -> Context:
    with _lock:
        if (key := f"{permits} {threads} {job.key}") not in _contexts:
            _contexts.clear()  # a process works for one run at a time
            _contexts[key] = _open(job, permits, threads)
        return _contexts[key]


def _open(job: Job, permits: int, threads: int | None) -> Context:
    import torch

    if job.device != "cpu":
        if not torch.cuda.is_available():
            raise ClusterError(
                f"the worker on {platform.node()} has no CUDA device and the run is for {job.device}; "
                f"ask for a GPU (gres in the cluster file), or start the run with --device cpu"
            )
        # The same bits in every process, and float32 that is float32 (cuDNN's default rounds to tf32).
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
    plan, weights = job.plan, _weights(job.weights, job.weights_sha256)
    first = _weights(job.first_weights, job.first_weights_sha256) if job.first_weights else None
    sampling = Sampling(job.members, job.seed, job.sampler, job.steps, job.tile)
    predictor = build_predictor(weights, first, plan.mode, sampling, Device(job.device, job.precision))
    one = 1 if job.device == "cpu" else threads  # as ``Device.running`` has it
    networks = ThreadPoolExecutor(permits, thread_name_prefix=THREAD, initializer=_set_threads, initargs=(one,))
    return Context(job, plan, predictor, threading.Semaphore(permits + AHEAD), networks, bytes_read())


def _weights(path: str, sha256: str | None) -> Weights:
    weights = load_weights(path, sha256)
    if weights.sha256 != sha256:
        raise ClusterError(f"the weights {path} of the worker on {platform.node()} are not those of the run")
    return weights


def _set_threads(threads: int | None) -> None:
    """Of torch, in a thread that runs networks: OpenMP keeps the number for each."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


_contexts: dict[str, Context] = {}
_lock = threading.Lock()
