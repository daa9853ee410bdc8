"""From sections to mean and members: networks applied to tiles, tiles put together to blocks.

Convention: greys are normalised (see ``greys``); a predictor takes tiles of one fixed shape and returns, for each,
the mean [z, y, x] and K members [k, z, y, x] of the tile's input box. A tile's result depends on the tile alone, not
on the block, the batch or the process that computes it. Members are put together first and compared afterwards, so
the spread has no dip where tiles overlap.

Where sections are damaged, planes between good neighbours farther apart are predicted from these, with a spread scaled
for the distance. Beyond the first or last good section nothing was measured: what is stored there is a mirror image,
and its uncertainty says that nothing is known.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emdiffuse_vol.diffusion.samplers import SAMPLERS
from emdiffuse_vol.diffusion.schedules import published_test, uniform_log_snr
from emdiffuse_vol.errors import BlockError, ConfigError, GeometryError
from emdiffuse_vol.geometry.boxes import Box, Triple, cell_box, cells_meeting
from emdiffuse_vol.geometry.tiles import Tiling
from emdiffuse_vol.models import slab
from emdiffuse_vol.models.checkpoints import Weights
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.modes import Isotropic
from emdiffuse_vol.reconstruct.greys import Codes, FloatArray, GreyMap
from emdiffuse_vol.reconstruct.noise import NoiseField
from emdiffuse_vol.reconstruct.plan import Block, Plan

# Normalised greys by which tissue differs from other tissue, root mean square: 0.73 in FIB-25, 0.69 in the VNC stack,
# between places 8 sections apart.
UNKNOWN = 0.7

# How PyTorch and the libraries below it say on the CPU, or outside its allocator, what OutOfMemoryError says elsewhere.
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "could not create a memory")


@dataclass(frozen=True)
class Tile:
    """box: output voxels computed; sections: [s, y, x]; index, t: [z], see ``models.slab.slab_features``."""

    box: Box
    sections: FloatArray
    index: NDArray[np.int64]
    t: FloatArray


class Predictor(Protocol):
    """``lost`` is the number of degrees of freedom the members' spread about the mean has lost: 0 where the mean is an
    output of its own, 1 where it is the members' average. ``evaluations``: network runs per voxel. ``batch``: tiles it
    takes at once; made smaller, for good, where they do not fit the memory."""

    tiling: Tiling
    batch: int
    members: int
    lost: int
    evaluations: int

    def __call__(self, tiles: list[Tile]) -> tuple[FloatArray, FloatArray]:
        """At most ``batch`` tiles -> mean [n, z, y, x], members [n, k, z, y, x]."""
        ...

    def flops(self) -> int:
        """Floating-point operations (multiply and add count as two) for one tile, mean and all members."""
        ...

    def memory(self) -> int:
        """Bytes held at the peak of one call, besides what it is given; measured by ``benchmarks/memory.py``."""
        ...


@dataclass(frozen=True)
class Device:
    """Where and how precisely networks run. ``precision``: float32 or bfloat16 (autocast)."""

    name: str
    precision: str

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.name.split(":")[0], torch.bfloat16)


PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(name: str = "auto", precision: str = "auto", exact: bool = False) -> Device:
    """CUDA where there is one; bfloat16 where the hardware multiplies it, which most CPUs do not, unless the
    network's arithmetic is to be ``exact``: the published one tells noise levels apart by digits bfloat16 lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise GeometryError(
            f"device {name} was asked for, but torch {torch.__version__} finds no CUDA device; use --device cpu"
        )
    try:
        found = torch.device(name).type
    except RuntimeError:
        found = ""
    if found not in ("cpu", "cuda") or (
        found == "cuda" and (torch.device(name).index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(
            f"device {name!r} is not here; choose auto, cpu, cuda or cuda:N of {torch.cuda.device_count()}"
        )
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        fast = name != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        precision = "bfloat16" if fast and not exact else "float32"
    return Device(name, precision)


@dataclass(frozen=True)
class Sampling:
    """The user's settings of a predictor: see ``job.Request``. tile: output voxels a tile owns."""

    members: int
    seed: int
    sampler: str
    steps: int
    tile: Triple | None


def build_predictor(net: torch.nn.Module, mode: Isotropic, sampling: Sampling, device: Device) -> Predictor:
    if isinstance(net, slab.SlabNet):
        return SlabPredictor(net, mode, sampling, device)
    if isinstance(net, UNet):
        return PlanePredictor(net, mode, sampling, device)
    raise AssertionError(f"no predictor for {type(net).__name__}")


class SlabPredictor:
    """Our network: one evaluation gives the mean, and each member one pass through its light stochastic path."""

    CORE: Triple = (64, 256, 256)
    batch = 1
    lost = 0
    evaluations = 1

    def __init__(self, net: slab.SlabNet, mode: Isotropic, sampling: Sampling, device: Device) -> None:
        core = sampling.tile or self.CORE
        if any(n < 1 or n % s for n, s in zip(core, slab.STRIDE, strict=True)):
            raise GeometryError(f"tile {core} is not a multiple of {slab.STRIDE}, as the slab network needs")
        self.tiling = Tiling(core, net.HALO).fitted(mode.output_shape, slab.STRIDE)
        self.net = net.to(device.name).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.mode, self.members, self.noise, self.device = mode, sampling.members, NoiseField(sampling.seed), device

    def __call__(self, tiles: list[Tile]) -> tuple[FloatArray, FloatArray]:
        (tile,) = tiles
        put = partial(torch.as_tensor, device=self.device.name)
        with torch.inference_mode(), self.device.autocast():
            features = slab.slab_features(put(tile.sections)[None], put(tile.index), put(tile.t))
            mean, fine, coarse = self.net.trunk(features, put(tile.t), put(self.mode.gaps(tile.box)))
            gates = self.net.gates(fine, coarse)
            del features, fine, coarse
            members = torch.empty((self.members, *mean.shape[2:]), device=mean.device)
            for k in range(self.members):
                noise = put(self.noise.normal(k, 0, tile.box, channels=2))[None]
                torch.add(mean[0, 0], self.net.spread(gates, noise)[0, 0], out=members[k])
        return mean[0].float().cpu().numpy(), members[None].cpu().numpy()

    def flops(self) -> int:
        z, y, x = self.tiling.shape

        def run(net: slab.SlabNet) -> None:
            _, fine, coarse = net.trunk(torch.empty(1, 5, z, y, x), torch.empty(z), self.mode.gap)
            gates = net.gates(fine, coarse)
            for _ in range(self.members):
                net.spread(gates, torch.empty(1, 2, z, y, x))

        return count_flops(self.net, run)

    def memory(self) -> int:
        voxel: int = self.net.BYTES_PER_VOXEL + 4 * self.members
        return prod(self.tiling.shape) * voxel


class PlanePredictor:
    """The published network: each plane on its own, ``steps`` evaluations for each member, the mean their average."""

    CORE: Triple = (1, 224, 224)
    BYTES_PER_PIXEL = 4000
    BATCH = 4
    lost = 1

    def __init__(self, net: UNet, mode: Isotropic, sampling: Sampling, device: Device) -> None:
        factor = mode.axial.factor
        if factor.denominator != 1:
            raise GeometryError(
                f"the published network knows whole factors, not {factor}; give --factor {round(factor)}"
            )
        depth, height, width = core = sampling.tile or self.CORE
        if depth != 1 or height < 28 or width < 28 or height % 7 or width % 7:
            raise GeometryError(f"tile {core} is not one plane of multiples of 7, as the published network needs")
        # 1/8 of a tile overlaps its neighbour, as published: 32 of 256.
        self.tiling = Tiling(core, (0, height // 14, width // 14), blend=True)
        self.net = net.to(device.name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.factor, self.members, self.noise, self.device = (
            int(factor),
            sampling.members,
            NoiseField(sampling.seed),
            device,
        )
        # A CPU takes 25 % longer for four tiles of 256 x 256 together than for one after the other (measured).
        self.batch = 1 if device.name == "cpu" else self.BATCH
        self.sampler = SAMPLERS[sampling.sampler]
        steps = sampling.steps
        # The published schedule for the published sampler; any other stays inside the noise levels seen in training.
        self.schedule = published_test(steps) if sampling.sampler == "ancestral" else uniform_log_snr(steps)
        self.evaluations = steps * sampling.members

    def __call__(self, tiles: list[Tile]) -> tuple[FloatArray, FloatArray]:
        padded = tiles + [tiles[-1]] * (self.batch - len(tiles))
        # Order as published: the section with the higher number first.
        pairs = np.stack([tile.sections[tile.index[0] + np.array([1, 0])] for tile in padded])
        # Where sections are bridged a plane may lie nearer to one than any of the planes the network knows.
        number = np.array([round(float(tile.t[0]) * self.factor) - 1 for tile in padded]).clip(0, self.factor - 2)
        condition = torch.as_tensor(pairs, device=self.device.name)
        index = torch.as_tensor(number, device=self.device.name)

        def eps(y: Tensor, gamma: float) -> Tensor:
            level = torch.full((len(padded),), gamma, device=y.device)
            result: Tensor = self.net(torch.cat([condition, y], dim=1), level, index)
            return result.float()

        members = np.empty((len(tiles), self.members, *self.tiling.shape), np.float32)
        with torch.inference_mode(), self.device.autocast():
            for k in range(self.members):

                def noise(step: int, member: int = k) -> Tensor:
                    fields = [self.noise.normal(member, step, tile.box)[0] for tile in padded]
                    return torch.as_tensor(np.stack(fields), device=self.device.name)

                members[:, k] = self.sampler(eps, noise, self.schedule).cpu().numpy()[: len(tiles)]
        return members.mean(axis=1), members

    def flops(self) -> int:
        _, y, x = self.tiling.shape

        def run(net: UNet) -> None:
            net(torch.empty(1, 3, y, x), torch.empty(1), torch.empty(1, dtype=torch.long))

        return count_flops(self.net, run) * self.evaluations

    def memory(self) -> int:
        return self.batch * prod(self.tiling.shape) * (self.BYTES_PER_PIXEL + 8 * self.members)


def count_flops(net: torch.nn.Module, run: Any) -> int:
    """Count on shapes alone: nothing is computed."""
    from copy import deepcopy

    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        run(deepcopy(net).to("meta"))
    return int(counter.get_total_flops())


def span_scales(weights: Weights, mode: Isotropic, members: int) -> dict[int, float]:
    """What the members' spread is to be multiplied by, for each span of good sections that occurs and for 1.

    Where sections are farther apart than the network knows, their spread is that of ``mode.widest``, and it is scaled
    by the square root of the rest. This extrapolates how errors grow: those of linear interpolation in FIB-25 are 12.2,
    18.5, 22.6 and 27.2 greys for sections 5, 10, 15 and 20 pixels apart.
    """

    def scale(span: int) -> float:
        known = min(span * mode.gap, max(mode.widest, mode.gap))
        return weights.calibrated_scale(known, members) * sqrt(span * mode.gap / known)

    return {span: scale(span) for span in {1, *mode.axial.spans}}


def predict_block(
    plan: Plan,
    block: Block,
    predictor: Predictor,
    sections: NDArray[Any],
    greys: GreyMap,
    scale: float | Mapping[int, float],
    fills: Mapping[Triple, float] | None = None,
) -> NDArray[Any]:
    """-> [2, z, y, x], mean and uncertainty as stored, of ``block.write``.

    sections: stored greys of ``block.read``. scale: calibration, stored uncertainty over the members' spread, one for
    all or one for each span of sections. fills: stored grey of each cell of the tiling that is empty (see
    ``reconstruct.empty``); its uncertainty is 0, and nothing is computed for it.

    Raises BlockError where the output of the network is not data, or where one tile does not fit the memory.
    """
    fills = fills or {}
    codes = Codes(str(sections.dtype))
    result = np.empty((2, *block.write.shape), sections.dtype)
    window = plan.tiling.window()

    def make(tile: Triple) -> Tile:
        return _tile(plan, tile, sections, block.read, greys)

    for piece, tiles in plan.pieces(block.write):
        part = result[(slice(None), *piece.slices(block.write.start))]
        if not _all_empty(plan, piece, fills):
            sums = np.zeros((1 + predictor.members, *piece.shape), np.float32)
            wanted = [tile for tile in tiles if _wanted(plan, tile, piece, fills)]
            try:
                for tile, mean, members in _run(predictor, wanted, make):
                    _add_tile(plan, tile, mean, members, window, piece, sums)
                if not np.isfinite(sums).all():
                    raise BlockError("the network gave NaN or infinity; not written")
            except BlockError as error:
                raise BlockError(f"block {block.index} ({block.write}): {error}") from None
            part[0] = codes.mean(greys.restore(sums[0]))
            part[1] = codes.uncertainty(greys.restore_spread(_uncertainty(plan, piece, sums, predictor, scale)))
            _copy_sections(plan, piece, sections, block.read, part)
        _fill_empty(plan, piece, fills, part)
    return result


def _run(
    predictor: Predictor, tiles: list[Triple], make: Callable[[Triple], Tile]
) -> Iterator[tuple[Triple, FloatArray, FloatArray]]:
    """The network over tiles, in batches. A batch that does not fit the memory is halved, and stays so."""
    done, again = 0, False
    while done < len(tiles):
        size = predictor.batch
        batch = [make(tile) for tile in tiles[done : done + size]]
        if (output := _attempt(predictor, batch)) is None:
            if size == 1 and again:
                z, y, x = predictor.tiling.shape
                raise BlockError(
                    f"memory is too small for one tile of {z} x {y} x {x}; use a smaller --tile, or fewer --workers"
                )
            again = size == 1
            predictor.batch = min(predictor.batch, max(1, size // 2))  # another thread may have been here
            free_memory()
            continue
        for tile, given, mean, members in zip(tiles[done : done + size], batch, *output, strict=True):
            _check_output(given, mean)
            yield tile, mean, members
        done, again = done + len(batch), False


def _attempt(predictor: Predictor, batch: list[Tile]) -> tuple[FloatArray, FloatArray] | None:
    """None where memory ran out. By then the error is gone, and with it what its frames held."""
    try:
        return predictor(batch)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or any(w in str(error) for w in NO_MEMORY)):
            raise
    return None


def free_memory() -> None:
    """Give back what is held for later use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_output(tile: Tile, mean: FloatArray) -> None:
    """A constant output from the network is a failure, not data, unless the sections next to its planes are as empty:
    a few specks may be lost on the way."""
    if mean.min() == mean.max():
        near = tile.sections[np.union1d(tile.index, tile.index + 1)]
        if np.mean(near != np.median(near)) > 0.01:
            raise BlockError(f"the network gave one grey for all of tile {tile.box}, whose input is not; not written")


def _add_tile(
    plan: Plan,
    tile: Triple,
    mean: FloatArray,
    members: FloatArray,
    window: FloatArray,
    piece: Box,
    sums: FloatArray,
) -> None:
    """Add the weighted mean and members of a tile to ``sums`` of a piece of a block."""
    start = plan.tiling.input_box(tile).start
    part = plan.tiling.reach_box(tile) & piece
    if part.empty:
        return
    inside, target = part.slices(start), part.slices(piece.start)
    weights = window[inside]
    sums[(0, *target)] += weights * mean[inside]
    sums[(slice(1, None), *target)] += weights * members[(slice(None), *inside)]


def _uncertainty(
    plan: Plan, piece: Box, sums: FloatArray, predictor: Predictor, scale: float | Mapping[int, float]
) -> FloatArray:
    """Calibrated spread of the members about the mean, normalised greys [z, y, x]."""
    mean, members = sums[0], sums[1:]
    variance = np.square(members - mean).sum(axis=0) / np.float32(predictor.members - predictor.lost)
    spread: FloatArray = np.sqrt(variance)
    planes = np.arange(piece.start[0], piece.stop[0])
    scales = [scale[int(n)] if isinstance(scale, Mapping) else scale for n in plan.mode.axial.span(planes)]
    spread *= np.array(scales, np.float32)[:, None, None]
    beyond = plan.mode.axial.beyond(planes)
    spread[beyond] = np.maximum(spread[beyond], np.float32(UNKNOWN))
    return spread


def _tile(plan: Plan, index: Triple, sections: NDArray[Any], read: Box, greys: GreyMap) -> Tile:
    box = plan.tiling.input_box(index)
    needed = plan.mode.read_box(box)
    below, t = plan.mode.axial.locate(np.arange(box.start[0], box.stop[0]))
    greys_of_tile = np.ascontiguousarray(greys.normalise(sections[needed.slices(read.start)]))
    return Tile(box, greys_of_tile, below - needed.start[0], t)


def _wanted(plan: Plan, tile: Triple, piece: Box, fills: Mapping[Triple, float]) -> bool:
    """Whether a tile has anything to give: planes that are not copies of sections, in cells that are not empty."""
    cell = cell_box(tile, plan.tiling.core)
    if plan.mode.axial.copied(np.arange(cell.start[0], cell.stop[0])).all():
        return False
    return not _all_empty(plan, plan.tiling.reach_box(tile) & piece, fills)


def _all_empty(plan: Plan, box: Box, fills: Mapping[Triple, float]) -> bool:
    return bool(fills) and all(cell in fills for cell in cells_meeting(box, plan.tiling.core))


def _fill_empty(plan: Plan, piece: Box, fills: Mapping[Triple, float], part: NDArray[Any]) -> None:
    """Write empty cells over whatever is there, copied sections included."""
    if fills:
        for cell in cells_meeting(piece, plan.tiling.core):
            if cell in fills:
                inside = (cell_box(cell, plan.tiling.core) & piece).slices(piece.start)
                part[(0, *inside)] = fills[cell]
                part[(1, *inside)] = 0


def _copy_sections(plan: Plan, piece: Box, sections: NDArray[Any], read: Box, part: NDArray[Any]) -> None:
    """Planes on a good section are that section, and certain if they were measured, not mirrored, there."""
    axial, planes = plan.mode.axial, np.arange(piece.start[0], piece.stop[0])
    _, y, x = piece.slices(read.start)
    number, _ = axial.locate(planes)
    measured = axial.measured(planes)
    for k in np.flatnonzero(axial.copied(planes)):
        part[0, k] = sections[int(number[k]) - read.start[0], y, x]
        if measured[k]:
            part[1, k] = 0
