"""A run, from what was asked to a sealed output.

    prepare      request -> prepared run: volume, mode, weights, plan, job. Everything that can fail, fails here
    reconstruct  open or continue the output, run the blocks, build the pyramid, seal

Running the same request again continues it. Nothing is written before ``prepare`` and the checks have passed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from emdiffuse_vol.diffusion.samplers import SAMPLERS
from emdiffuse_vol.errors import ConfigError, OutputError
from emdiffuse_vol.executors import EXECUTORS, Executor, make_executor
from emdiffuse_vol.executors.local import AHEAD
from emdiffuse_vol.geometry.axial import parse_factor
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.models.checkpoints import Weights, load_weights
from emdiffuse_vol.models.slab import SlabNet
from emdiffuse_vol.modes import check_mode, isotropic_mode
from emdiffuse_vol.reconstruct.greys import dtype_greys, measure_greys
from emdiffuse_vol.reconstruct.job import Job, Request
from emdiffuse_vol.reconstruct.ledger import Ledger, Receipt
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.plan import Plan, plan_blocks
from emdiffuse_vol.reconstruct.predict import Predictor, Sampling, build_predictor, choose_device
from emdiffuse_vol.reconstruct.pyramid import LevelTask
from emdiffuse_vol.reconstruct.worker import BlockTask
from emdiffuse_vol.stores.kvstore import is_remote
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.volume import Volume

BASE_BYTES = 1.2e9  # python, torch with its scratch, and the stores, before any tile; measured by benchmarks/memory.py


@dataclass(frozen=True)
class Prepared:
    request: Request
    volume: Volume
    weights: Weights
    predictor: Predictor
    plan: Plan
    job: Job

    @property
    def voxel_size(self) -> tuple[float, float, float]:
        z, y, x = self.volume.spec.voxel_size
        return z / float(self.plan.mode.axial.factor), y, x

    @property
    def origin(self) -> tuple[float, float, float]:
        """Centre of the first stored voxel, in nm."""
        z, y, x = (
            o + i * s for o, i, s in zip(self.volume.spec.origin, self.plan.region.start, self.voxel_size, strict=True)
        )
        return z, y, x

    @property
    def disk_bytes(self) -> int:
        """Uncompressed size of the output, pyramid included: the most it can need."""
        return int(2 * self.plan.region.size * np.dtype(self.volume.spec.dtype).itemsize * 8 / 7)

    @property
    def memory_bytes(self) -> int:
        """Peak memory of the run: it depends on tile, block and workers, not on the volume."""
        block = self.plan[0]
        piece, _ = next(self.plan.pieces(block.write))
        # Sums of the mean and the members, and as much again while the spread is taken.
        sums = 4 * piece.size * (2 * self.request.members + 5)
        held = np.dtype(self.volume.spec.dtype).itemsize * (block.read.size + 2 * block.write.size)
        workers = self.request.workers
        # dask: a driver, and a process for each worker; local: all in one.
        processes, networks = (workers, 1) if self.request.executor == "dask" else (1, workers)
        each = BASE_BYTES + networks * (self.predictor.memory() + sums) + (networks + AHEAD) * held
        return int(processes * each + (BASE_BYTES if self.request.executor == "dask" else 0))

    def summary(self) -> dict[str, Any]:
        """The plan, as JSON values."""
        plan, spec = self.plan, self.volume.spec
        flops = self.predictor.flops() / prod(plan.tiling.shape)
        overlap = plan.overlap()
        return {
            "input": {"shape": spec.shape, "voxel_size": spec.voxel_size, "dtype": spec.dtype},
            "output": {"shape": plan.region.shape, "voxel_size": self.voxel_size, "dtype": spec.dtype},
            "factor": str(plan.mode.axial.factor),
            "gap_pixels": plan.mode.gap,
            "mode": self.request.mode,
            "weights": self.weights.name,
            "members": self.request.members,
            "blocks": len(plan),
            "block": plan.block,
            "shard": plan.shard,
            "tiles_per_block": sum(1 for _ in plan.tiling.tiles_for(plan[0].write)),
            "tile": plan.tiling.shape,
            "overlap_work": overlap - 1,
            "evaluations": self.predictor.evaluations,
            "flop_per_voxel_network": flops,
            "flop_per_voxel": flops * overlap,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "device": self.job.device,
            "precision": self.job.precision,
        }


@dataclass(frozen=True)
class Progress:
    """Told after every block. stage: "blocks" or "level 1", ...; voxels: of the output, done so far by this command."""

    stage: str
    done: int
    total: int
    voxels: int
    receipt: Receipt | None = None


Notify = Callable[[Progress], None]


def prepare(request: Request) -> Prepared:
    """Everything about a run that can be known before it starts. Raises one of our errors; writes nothing."""
    check_place(request.out, request.input)
    volume = open_volume(request.input, voxel_size=request.voxel_size, level=request.level, channel=request.channel)
    return prepare_volume(request, volume)


def prepare_volume(request: Request, volume: Volume) -> Prepared:
    """The same for a volume that is open already."""
    check_mode(request.mode)
    if not 0 <= request.seed < 2**64:
        raise ConfigError(f"seed is {request.seed}; it must be from 0 to 2^64 - 1")
    if request.members < 2:
        raise ConfigError(f"members is {request.members}; a spread needs at least 2")
    if request.workers < 1:
        raise ConfigError(f"workers is {request.workers}; at least 1 is needed")
    if request.sampler not in SAMPLERS:
        raise ConfigError(f"sampler {request.sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if request.steps < 1:
        raise ConfigError(f"steps is {request.steps}; at least 1 is needed")
    if request.executor not in EXECUTORS:
        raise ConfigError(f"executor {request.executor!r} is unknown; choose one of {', '.join(EXECUTORS)}")
    spec = volume.spec
    factor = None if request.factor is None else parse_factor(str(request.factor))
    mode = isotropic_mode(spec.shape, spec.voxel_size, factor, request.target_voxel_size)
    region = mode.region(None if request.roi is None else parse_roi(request.roi))
    weights = load_weights(request.weights)
    weights.check(request.mode, mode.gap)
    device = choose_device(request.device, request.precision, exact=not isinstance(weights.net, SlabNet))
    sampling = Sampling(request.members, request.seed, request.sampler, request.steps, request.tile)
    predictor = build_predictor(weights.net, mode, sampling, device)
    plan = plan_blocks(mode, region, predictor.tiling, request.block, request.shard)
    greys, sample = measure_greys(spec.shape, volume.read)
    if weights.metadata.get("greys") == "dtype":
        greys = dtype_greys(spec.dtype)
    job = Job(
        input=volume.url,
        input_options=volume.options,
        input_identity={**spec.identity, "sample": sample},
        input_shape=spec.shape,
        out=str(Path(request.out).absolute()),
        mode=request.mode,
        weights=str(weights.path),
        weights_sha256=weights.sha256,
        factor=str(mode.axial.factor),
        gap=mode.gap,
        region=(region.start, region.stop),
        members=request.members,
        seed=request.seed,
        sampler=request.sampler if predictor.evaluations > 1 else "one-pass",
        steps=request.steps if predictor.evaluations > 1 else 1,
        tile=request.tile,
        greys=(greys.low, greys.high),
        scale=weights.calibrated_scale(mode.gap, request.members),
        tiling=(plan.tiling.core, plan.tiling.halo, plan.tiling.blend),
        block=plan.block,
        shard=plan.shard,
        device=device.name,
        precision=device.precision,
    )
    return Prepared(request, volume, weights, predictor, plan, job)


def check_place(out: str, source: str) -> None:
    """Refuse an output that is not a local path, or that touches the input."""
    if is_remote(out):
        raise OutputError(f"--out {out} is a URL; outputs are written to local paths, then copied")
    place, given = Path(out).resolve(), Path(source).resolve()
    if place == given or given in place.parents or place in given.parents:
        raise OutputError(f"--out {out} is, holds or lies in the input {source}; choose another place")


def parse_roi(text: str) -> Box:
    """A region in input voxels, written z0:z1,y0:y1,x0:x1."""
    try:
        (a, d), (b, e), (c, f) = (tuple(map(int, part.split(":"))) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--roi {text!r} is not of the form z0:z1,y0:y1,x0:x1") from None
    return Box((a, b, c), (d, e, f))


def reconstruct(request: Request, notify: Notify = lambda progress: None) -> Output:
    """Run a request to its end, or continue it. Returns the sealed output."""
    prepared = prepare(request)
    output = Output(Path(request.out))
    output.open_or_create(prepared, request.overwrite)
    if output.sealed:
        return output
    executor = make_executor(request.executor, request.workers)
    try:
        _run_blocks(prepared, output, executor, notify)
        _build_pyramid(prepared, output, executor, notify)
    finally:
        executor.close()
    output.seal()
    return output


def _run_blocks(prepared: Prepared, output: Output, executor: Executor, notify: Notify) -> None:
    plan = prepared.plan
    ledger = Ledger(output.path, "", plan.grid)
    permits = executor.workers if prepared.request.executor == "local" else 1
    task = BlockTask(prepared.job, permits, executor.threads)
    output.log("run", done=ledger.done, total=len(plan), executor=prepared.request.executor, workers=executor.workers)
    voxels = 0
    notify(Progress("blocks", ledger.done, len(plan), voxels))
    started = time.perf_counter()
    for receipt in executor.run(task, ledger.pending()):
        ledger.record(receipt)
        voxels += plan.write_box(receipt.index).size
        notify(Progress("blocks", ledger.done, len(plan), voxels, receipt))
    output.log("blocks done", voxels=voxels, seconds=round(time.perf_counter() - started, 3))


def _build_pyramid(prepared: Prepared, output: Output, executor: Executor, notify: Notify) -> None:
    for level, shape in enumerate(output.level_shapes()[1:], start=1):
        task = LevelTask(str(output.path.absolute()), level, shape, prepared.plan.shard)
        ledger = Ledger(output.path, f"level{level}", task.grid)
        for receipt in executor.run(task, ledger.pending()):
            ledger.record(receipt)
            notify(Progress(f"level {level}", ledger.done, len(ledger.state), 0, receipt))
