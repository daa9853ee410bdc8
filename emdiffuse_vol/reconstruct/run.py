"""A run, from what was asked to a sealed output.

    prepare      request -> prepared run: volume, mode, weights, plan, job. Everything that can fail, fails here
    reconstruct  create or continue the output, and complete it (``engine``) on an executor

Running the same request again continues it. Nothing is written before ``prepare`` and the checks have passed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from emdiffuse_vol import __version__
from emdiffuse_vol.diffusion.samplers import ALIASES, SAMPLERS
from emdiffuse_vol.diffusion.schedules import published_misfit
from emdiffuse_vol.errors import ConfigError, OutputError
from emdiffuse_vol.executors import AHEAD, EXECUTORS, Executor, available_cores, visible_gpus
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.models.checkpoints import Weights
from emdiffuse_vol.models.slab import SlabNet
from emdiffuse_vol.modes import check_mode
from emdiffuse_vol.modes.mode import to_input
from emdiffuse_vol.reconstruct.device import Device, choose_device
from emdiffuse_vol.reconstruct.empty import describe_empty
from emdiffuse_vol.reconstruct.engine import Notify, complete
from emdiffuse_vol.reconstruct.estimate import traffic
from emdiffuse_vol.reconstruct.greys import SectionMap, dtype_greys, measure_greys, measure_sections
from emdiffuse_vol.reconstruct.job import Job, Request
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.plan import Plan, plan_blocks
from emdiffuse_vol.reconstruct.predict import Predictor
from emdiffuse_vol.reconstruct.predictors import Sampling, build_predictor, span_scales
from emdiffuse_vol.reconstruct.resources import available_memory
from emdiffuse_vol.reconstruct.source import resolve_damaged
from emdiffuse_vol.reconstruct.stages import choose_stages
from emdiffuse_vol.reconstruct.tuning import settle
from emdiffuse_vol.stores.kvstore import is_remote
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.sections import without_sections
from emdiffuse_vol.stores.volume import Volume

logger = logging.getLogger(__name__)

NONE = "none"  # an executor that runs nothing: the output is made for `emdvol work`
# Python, torch and the stores before any tile: measured by benchmarks/memory.py; with the libraries of CUDA, a guess.
BASE_BYTES, CUDA_BASE_BYTES = 0.4e9, 1.2e9


@dataclass(frozen=True)
class Prepared:
    request: Request
    volume: Volume
    weights: Weights
    first: Weights | None
    predictor: Predictor
    plan: Plan
    job: Job

    @property
    def voxel_size(self) -> tuple[float, float, float]:
        mode, (z, y, x) = self.plan.mode, self.volume.spec.voxel_size
        return z / float(mode.axial.factor), y / mode.lateral, x / mode.lateral

    @property
    def origin(self) -> tuple[float, float, float]:
        """Centre of the first stored voxel, in nm."""
        spec, first = self.volume.spec, to_input(self.plan.mode, self.plan.region.start)
        z, y, x = (o + i * s for o, i, s in zip(spec.origin, first, spec.voxel_size, strict=True))
        return z, y, x

    @property
    def disk_bytes(self) -> int:
        """Uncompressed size of the output, pyramid included: the most it can need."""
        return int(2 * self.plan.region.size * np.dtype(self.volume.spec.dtype).itemsize * 8 / 7)

    @property
    def process_bytes(self) -> int:
        """Peak memory of a process: it depends on tile, block and networks in it, not on the volume."""
        block = self.plan[0]
        piece, _ = next(self.plan.pieces(block.write))
        # While the spread is taken; and, where tiles are blended, sums of the mean and the members.
        sums = 4 * piece.size * (4 + (1 + self.request.members) * self.plan.tiling.blend)
        held = np.dtype(self.volume.spec.dtype).itemsize * (block.read.size + 2 * block.write.size)
        networks = (self.request.workers or 1) if executor_of(self.request) == "local" else 1
        base = BASE_BYTES if self.job.device == "cpu" else CUDA_BASE_BYTES
        return int(base + networks * (self.predictor.memory() + sums) + (networks + AHEAD) * held)

    def with_workers(self) -> Prepared:
        """As many networks as there are cores, blocks, and half of the free memory for them."""
        free = available_memory()
        for number in range(min(available_cores(), len(self.plan)), 1, -1):
            several = replace(self, request=replace(self.request, workers=number))
            if free is not None and several.memory_bytes < free / 2:
                return several
        return replace(self, request=replace(self.request, workers=1))

    @property
    def memory_bytes(self) -> int:
        """Of all processes of the run on this machine."""
        workers = self.request.workers or len(visible_gpus()) or 1
        here = {"local": self.process_bytes, "dask": int(BASE_BYTES) + workers * self.process_bytes}
        return here.get(executor_of(self.request), int(BASE_BYTES))

    def summary(self) -> dict[str, Any]:
        """The plan, as JSON values."""
        plan, spec = self.plan, self.volume.spec
        tile_flops = self.predictor.flops()
        flops, work = tile_flops / prod(plan.tiling.shape), traffic(plan, spec)
        return {
            "input": {
                "shape": self.job.input_shape,
                "voxel_size": spec.voxel_size,
                "dtype": spec.dtype,
                "chunk": spec.chunk,
            },
            "output": {"shape": plan.region.shape, "voxel_size": self.voxel_size, "dtype": spec.dtype},
            "factor": str(plan.mode.axial.factor),
            "gap_pixels": plan.mode.gap,
            "mode": self.request.mode,
            "weights": "+".join(weights.name for weights in (self.first, self.weights) if weights),
            "members": self.request.members,
            "blocks": len(plan),
            "block": plan.block,
            "shard": plan.shard,
            "tiles_per_block": sum(1 for _ in plan.tiling.tiles_for(plan[0].write)),
            "tile": plan.tiling.shape,
            "cell": plan.tiling.core,
            "evaluations": self.predictor.evaluations,
            **work,
            "flop_per_voxel_network": flops,
            "flop_per_voxel": flops * (1 + work["overlap_work"]),
            "flop": tile_flops * work["tiles"],
            "memory_bytes": self.memory_bytes,
            "process_bytes": self.process_bytes,
            "disk_bytes": self.disk_bytes,
            "device": self.job.device,
            "precision": self.job.precision,
        }


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
    if request.workers is not None and request.workers < 1:
        raise ConfigError(f"workers is {request.workers}; at least 1 is needed")
    if not request.patience > 0:
        raise ConfigError(f"patience is {request.patience} minutes; it must be above 0")
    sampler = ALIASES.get(request.sampler, request.sampler)
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler {request.sampler!r} is unknown; choose one of {', '.join([*SAMPLERS, *ALIASES])}")
    if request.steps < 1:
        raise ConfigError(f"steps is {request.steps}; at least 1 is needed")
    if request.invert and request.adapt is not None:
        raise ConfigError("--adapt fits the weights to the greys as they are; leave out --invert, or --adapt")
    executor = executor_of(request)
    if request.cluster is not None:
        request.cluster.check()
    spec = volume.spec
    damaged = resolve_damaged(request.damaged, volume)
    stack = without_sections(volume, damaged)
    stages = choose_stages(request, spec, damaged)
    mode, weights, first = stages.mode, stages.weights, stages.first
    region = mode.region(None if request.roi is None else parse_roi(request.roi))
    if executor == "local" and isinstance(weights.net, SlabNet) and first is None:
        request = settle(request, weights)
    device, here = choose_devices(request, executor, stages.exact)
    sampling = Sampling(request.members, request.seed, sampler, request.steps, request.tile)
    predictor = build_predictor(weights, first, mode, sampling, here)
    if predictor.evaluations > 1 and sampler == "ancestral" and (misfit := published_misfit(request.steps)):
        logger.warning("--steps %d of sampler %s: %s", request.steps, request.sampler, misfit)
    plan = plan_blocks(mode, region, predictor.tiling, request.block, request.shard)
    greys, sample = measure_greys(stack.spec.shape, stack.read)
    even = measure_sections(stack.spec.shape, stack.read) if request.even_sections else SectionMap()
    if request.even_sections:
        greys, _ = measure_greys(stack.spec.shape, lambda box: even.even(stack.read(box), box.start[0]))
    if weights.metadata.get("greys") == "dtype":
        greys = dtype_greys(spec.dtype)
    scales = span_scales(weights, mode, request.members)
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
        damaged=damaged,
        gap=mode.gap,
        widest_gap=mode.widest,
        region=(region.start, region.stop),
        members=request.members,
        seed=request.seed,
        sampler=sampler if predictor.evaluations > 1 else "one-pass",
        steps=request.steps if predictor.evaluations > 1 else 1,
        tile=request.tile,
        greys=(greys.low, greys.high),
        scale=scales.pop(1),
        bridged_scale={str(span): scale for span, scale in scales.items()},
        empty=describe_empty(plan, volume, request.skip_empty, request.mask),
        tiling=(plan.tiling.core, plan.tiling.halo, plan.tiling.blend),
        block=plan.block,
        shard=plan.shard,
        device=device.name,
        precision=device.precision,
        first_weights=str(first.path) if first else None,
        first_weights_sha256=first.sha256 if first else None,
        sections=stages.sections,
        inverted=request.invert,
        section_greys=(even.gains, even.offsets),
    )
    prepared = Prepared(request, stack, weights, first, predictor, plan, job)
    if executor == "local" and request.workers is None and here.name == "cpu":
        prepared = prepared.with_workers()
    if executor == "slurm" and request.cluster:
        needed, given = request.cluster.workers * prepared.process_bytes, request.cluster.memory_bytes
        if needed > given:
            raise ConfigError(
                f"the {request.cluster.workers} workers of a job need {needed / 1e9:.1f} GB and cluster.memory is "
                f"{given / 1e9:.1f} GB; ask for more, or use a smaller --tile or --shard"
            )
    return prepared


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


def choose_devices(request: Request, executor: str, exact: bool) -> tuple[Device, Device]:
    """The device of the run, which may be of machines that are not this one, and one to plan with here."""
    gpus = request.cluster.gpus if request.cluster and executor == "slurm" else None
    if gpus == 0 and request.device.startswith("cuda"):
        raise ConfigError(f"--device {request.device} and the jobs of --cluster have no GPU; add gres, such as gpu:1")
    wanted = ("cuda" if gpus else "cpu") if request.device == "auto" and gpus is not None else request.device
    if wanted.startswith("cuda") and executor in ("scheduler", "slurm", NONE):
        precision = request.precision if request.precision != "auto" else ("float32" if exact else "bfloat16")
        return Device(wanted, precision), choose_device("cpu", "float32")
    device = choose_device(wanted, request.precision, exact)
    return device, device


def executor_of(request: Request) -> str:
    """Name of the executor, from what was asked. Raises ConfigError where two are asked for."""
    asked = [request.executor] if request.executor else []
    asked += ["scheduler"] if request.scheduler and request.executor != "scheduler" else []
    asked += ["slurm"] if request.cluster and request.executor != "slurm" else []
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} were asked for; choose one of --executor, --scheduler, --cluster")
    name = asked[0] if asked else "local"
    if name not in (*EXECUTORS, NONE):
        raise ConfigError(f"executor {name!r} is unknown; choose one of {', '.join((*EXECUTORS, NONE))}")
    for kind, setting, flag in (
        ("scheduler", request.scheduler, "--scheduler"),
        ("slurm", request.cluster, "--cluster"),
    ):
        if name == kind and not setting:
            raise ConfigError(f"executor {name} needs to know which; give {flag}")
    return name


def make_executor(request: Request) -> Executor:
    """Modules of executors are imported when they are asked for. Raises ClusterError where it cannot be had."""
    match executor_of(request):
        case "local":
            from emdiffuse_vol.executors.local import LocalExecutor

            return LocalExecutor(request.workers or 1)
        case "dask":
            from emdiffuse_vol.executors.dask import on_this_machine

            return on_this_machine(request.workers)
        case "scheduler":
            from emdiffuse_vol.executors.dask import on_scheduler

            return on_scheduler(str(request.scheduler), __version__)
        case _:
            from emdiffuse_vol.executors.slurm import on_slurm

            assert request.cluster is not None
            return on_slurm(request.cluster)


def reconstruct(request: Request, notify: Notify = lambda progress: None, *, retry_failed: bool = False) -> Output:
    """Run a request to its end, or continue it. Returns the sealed output; with executor ``none``, the created one."""
    prepared = prepare(request)
    output = Output(Path(request.out))
    output.open_or_create(prepared, request.overwrite)
    if output.sealed or executor_of(request) == NONE:
        return output
    executor = make_executor(prepared.request)
    try:
        patience = request.patience * 60
        complete(
            output,
            prepared.job,
            executor,
            executor_of(request),
            notify,
            retry_failed=retry_failed,
            patience=patience,
        )
    finally:
        executor.close()
    return output
