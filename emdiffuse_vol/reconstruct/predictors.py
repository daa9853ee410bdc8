"""Predictors: how each network is run on a tile, and what that costs.

Convention: as in ``predict``; a predictor takes tiles of one fixed shape and returns, for each, the mean and K members.
Our networks see a bounded distance, so their tiles are exact; the published ones see their whole tile, and theirs are
blended.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emdiffuse_vol.diffusion.samplers import SAMPLERS
from emdiffuse_vol.diffusion.schedules import published_test, uniform_log_snr
from emdiffuse_vol.errors import GeometryError
from emdiffuse_vol.geometry.boxes import Triple
from emdiffuse_vol.geometry.tiles import Tiling
from emdiffuse_vol.models import slab
from emdiffuse_vol.models.checkpoints import Weights
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.modes import Isotropic
from emdiffuse_vol.reconstruct.device import Device
from emdiffuse_vol.reconstruct.greys import FloatArray
from emdiffuse_vol.reconstruct.noise import NoiseField
from emdiffuse_vol.reconstruct.predict import Predictor, Tile


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
