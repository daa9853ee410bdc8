"""From sections to mean and members: networks applied to tiles, tiles put together to blocks.

Convention: greys are normalised (see ``greys``); a predictor takes tiles of one fixed shape and returns, for each,
the mean [z, y, x] and K members [k, z, y, x] of the tile's input box. A tile's result depends on the tile alone, not
on the block, the batch or the process that computes it. Members are put together first and compared afterwards, so
the spread has no dip where tiles overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emdiffuse_vol.diffusion.samplers import SAMPLERS
from emdiffuse_vol.diffusion.schedules import published_test, uniform_log_snr
from emdiffuse_vol.errors import BlockError, ConfigError, GeometryError
from emdiffuse_vol.geometry.boxes import Box, Triple, cell_box
from emdiffuse_vol.geometry.tiles import Tiling
from emdiffuse_vol.models import slab
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.modes import Isotropic
from emdiffuse_vol.reconstruct.greys import Codes, FloatArray, GreyMap
from emdiffuse_vol.reconstruct.noise import NoiseField
from emdiffuse_vol.reconstruct.plan import Block, Plan


@dataclass(frozen=True)
class Tile:
    """box: output voxels computed; sections: [s, y, x]; index, t: [z], see ``models.slab.slab_features``."""

    box: Box
    sections: FloatArray
    index: NDArray[np.int64]
    t: FloatArray


class Predictor(Protocol):
    """``lost`` is the number of degrees of freedom the members' spread about the mean has lost: 0 where the mean is an
    output of its own, 1 where it is the members' average. ``evaluations``: network runs per voxel."""

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
    BYTES_PER_VOXEL = 88
    batch = 1
    lost = 0
    evaluations = 1

    def __init__(self, net: slab.SlabNet, mode: Isotropic, sampling: Sampling, device: Device) -> None:
        core = sampling.tile or self.CORE
        if any(n < 1 or n % s for n, s in zip(core, slab.STRIDE, strict=True)):
            raise GeometryError(f"tile {core} is not a multiple of {slab.STRIDE}, as the slab network needs")
        self.tiling = Tiling(core, slab.HALO).fitted(mode.output_shape, slab.STRIDE)
        self.net = net.to(device.name).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.gap, self.members, self.noise, self.device = mode.gap, sampling.members, NoiseField(sampling.seed), device

    def __call__(self, tiles: list[Tile]) -> tuple[FloatArray, FloatArray]:
        (tile,) = tiles
        put = partial(torch.as_tensor, device=self.device.name)
        with torch.inference_mode(), self.device.autocast():
            features = slab.slab_features(put(tile.sections)[None], put(tile.index), put(tile.t))
            mean, fine, coarse = self.net.trunk(features, put(tile.t), self.gap)
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
            _, fine, coarse = net.trunk(torch.empty(1, 5, z, y, x), torch.empty(z), self.gap)
            gates = net.gates(fine, coarse)
            for _ in range(self.members):
                net.spread(gates, torch.empty(1, 2, z, y, x))

        return count_flops(self.net, run)

    def memory(self) -> int:
        return prod(self.tiling.shape) * (self.BYTES_PER_VOXEL + 4 * self.members)


class PlanePredictor:
    """The published network: each plane on its own, ``steps`` evaluations for each member, the mean their average."""

    CORE: Triple = (1, 224, 224)
    BYTES_PER_PIXEL = 4000
    batch = 4
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
        self.sampler = SAMPLERS[sampling.sampler]
        steps = sampling.steps
        # The published schedule for the published sampler; any other stays inside the noise levels seen in training.
        self.schedule = published_test(steps) if sampling.sampler == "ancestral" else uniform_log_snr(steps)
        self.evaluations = steps * sampling.members

    def __call__(self, tiles: list[Tile]) -> tuple[FloatArray, FloatArray]:
        padded = tiles + [tiles[-1]] * (self.batch - len(tiles))
        # Order as published: the section with the higher number first.
        pairs = np.stack([tile.sections[tile.index[0] + np.array([1, 0])] for tile in padded])
        number = np.array([round(float(tile.t[0]) * self.factor) - 1 for tile in padded])
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


def predict_block(
    plan: Plan, block: Block, predictor: Predictor, sections: NDArray[Any], greys: GreyMap, scale: float
) -> NDArray[Any]:
    """-> [2, z, y, x], mean and uncertainty as stored, of ``block.write``.

    sections: stored greys of ``block.read``; scale: calibration, stored uncertainty over the members' spread.
    """
    codes = Codes(str(sections.dtype))
    result = np.empty((2, *block.write.shape), sections.dtype)
    for piece, tiles in plan.pieces(block.write):
        sums = np.zeros((1 + predictor.members, *piece.shape), np.float32)
        predicted = [tile for tile in tiles if not _measured(plan, tile)]
        for batch in _batches(predicted, predictor.batch):
            _add_tiles(plan, batch, predictor, sections, block.read, greys, piece, sums)
        if not np.isfinite(sums).all():
            raise BlockError(f"block {block.index} ({block.write}): the network gave NaN or infinity; not written")
        mean, members = sums[0], sums[1:]
        spread = np.sqrt(np.square(members - mean).sum(axis=0) / np.float32(predictor.members - predictor.lost))
        part = result[(slice(None), *piece.slices(block.write.start))]
        part[0] = codes.mean(greys.restore(mean))
        part[1] = codes.uncertainty(greys.restore_spread(spread * np.float32(scale)))
        _copy_measured(plan, piece, sections, block.read, part)
    return result


def _add_tiles(
    plan: Plan,
    batch: list[Triple],
    predictor: Predictor,
    sections: NDArray[Any],
    read: Box,
    greys: GreyMap,
    piece: Box,
    sums: FloatArray,
) -> None:
    """Predict a batch of tiles and add their weighted mean and members to ``sums`` of a piece of a block."""
    window = plan.tiling.window()
    means, members = predictor([_tile(plan, tile, sections, read, greys) for tile in batch])
    for tile, mean, member in zip(batch, means, members, strict=True):
        box = plan.tiling.input_box(tile)
        part = plan.tiling.reach_box(tile) & piece
        if part.empty:
            continue
        inside, weights = part.slices(box.start), window[part.slices(box.start)]
        target = part.slices(piece.start)
        sums[(0, *target)] += weights * mean[inside]
        sums[(slice(1, None), *target)] += weights * member[(slice(None), *inside)]


def _tile(plan: Plan, index: Triple, sections: NDArray[Any], read: Box, greys: GreyMap) -> Tile:
    box = plan.tiling.input_box(index)
    needed = plan.mode.read_box(box)
    below, t = plan.mode.axial.locate(np.arange(box.start[0], box.stop[0]))
    greys_of_tile = np.ascontiguousarray(greys.normalise(sections[needed.slices(read.start)]))
    return Tile(box, greys_of_tile, below - needed.start[0], t)


def _measured(plan: Plan, tile: Triple) -> bool:
    """Whether every plane the tile owns is a measured section, which will be copied."""
    cell = cell_box(tile, plan.tiling.core)
    return bool(plan.mode.axial.measured(np.arange(cell.start[0], cell.stop[0])).all())


def _copy_measured(plan: Plan, piece: Box, sections: NDArray[Any], read: Box, part: NDArray[Any]) -> None:
    planes = np.arange(piece.start[0], piece.stop[0])
    _, y, x = piece.slices(read.start)
    for k in np.flatnonzero(plan.mode.axial.measured(planes)):
        section, _ = plan.mode.axial.locate(planes[k : k + 1])
        part[0, k] = sections[int(section[0]) - read.start[0], y, x]
        part[1, k] = 0


def _batches(tiles: list[Triple], size: int) -> Iterator[list[Triple]]:
    rest = iter(tiles)
    while batch := list(islice(rest, size)):
        yield batch
