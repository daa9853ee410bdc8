"""Predictors: how each network is run on a tile, and what that costs.

Convention: as in ``predict``; a predictor takes tiles of one fixed shape and returns, for each, the mean and K members.
Our networks see a bounded distance, so their tiles are exact; the published ones see their whole tile, and theirs are
blended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm, prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emdiffuse_vol.diffusion.samplers import SAMPLERS
from emdiffuse_vol.diffusion.schedules import published_test, uniform_log_snr
from emdiffuse_vol.errors import GeometryError
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.geometry.tiles import Tiling
from emdiffuse_vol.models import slab, streaming
from emdiffuse_vol.models.checkpoints import Weights
from emdiffuse_vol.models.section import SectionNet
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.modes import Chain, Isotropic, Mode, SectionWise
from emdiffuse_vol.reconstruct.device import Device
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


def build_predictor(
    weights: Weights, first: Weights | None, mode: Mode, sampling: Sampling, device: Device
) -> Predictor:
    """first: weights of the first mode of a chain."""
    net: Any = weights.net
    if isinstance(net, UNet):
        return PlanePredictor(net, mode, sampling, device)
    if isinstance(mode, Isotropic):
        return SlabPredictor(net, mode, sampling, device)
    if isinstance(mode, SectionWise):
        return SectionPredictor(net, mode, sampling, device)
    assert isinstance(mode, Chain) and first is not None
    return ChainPredictor(first, weights, mode, sampling, device)


class SlabPredictor:
    """Our network: one evaluation gives the mean, and each member one pass through its light stochastic path."""

    CORE: Triple = (64, 256, 256)
    batch = 1
    lost = 0
    evaluations = 1

    def __init__(
        self, net: slab.SlabNet, mode: Isotropic, sampling: Sampling, device: Device, stride: Triple = slab.STRIDE
    ) -> None:
        self.tiling = exact_tiling(sampling.tile or self.CORE, net.HALO, stride, mode)
        self.net = net.to(device.name)
        self.mode, self.members, self.noise, self.device = mode, sampling.members, NoiseField(sampling.seed), device

    def __call__(self, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
        (tile,) = tiles
        core = self.tiling.core
        with self.device.running():
            mean, members = self.device.empty(core), self.device.empty((self.members, *core))
            for planes, best, gates in self.evaluate(self.device.put(tile.sections), tile):
                mean[planes] = best
                for k in range(self.members):
                    torch.add(best, self.spread(gates, k, tile.box, planes), out=members[k, planes])
        return mean[None], members[None]

    def evaluate(
        self, sections: Tensor, tile: Tile, below: int = 0
    ) -> Iterator[tuple[slice, Tensor, tuple[Tensor, Tensor]]]:
        """sections: [s, y, x], the first of them number ``below`` of the tile's -> planes of the core, their mean
        [z, y, x], and gates."""
        put = self.device.put
        index, t, gaps = put(tile.index - below), put(tile.t), put(self.mode.gaps(tile.box))
        edge = self.net.HALO[1] - streaming.features_margin(self.net)
        cut = slice(edge, -edge or None)
        near = sections[None, :, cut, cut]

        def features(planes: slice) -> Tensor:
            return slab.slab_features(near, index[planes], t[planes])[0].transpose(0, 1)

        for planes, mean, fine, coarse in self.net.stream(features, t, gaps, self.device.step):
            yield planes, mean[:, 0], streaming.gates(self.net, fine, coarse)

    def spread(self, gates: tuple[Tensor, Tensor], member: int, box: Box, planes: slice) -> Tensor:
        """-> [z, y, x], what a member adds to the mean of ``planes`` of the core. box: of the whole tile."""
        core = self.tiling.reach_of(box)
        (z, y, x), (_, bottom, right) = core.start, core.stop
        place = Box((z + planes.start, y, x), (z + planes.stop, bottom, right))
        margin = (self.net.DEEP // 2, streaming.NOISE_MARGIN, streaming.NOISE_MARGIN)
        noise = self.noise.normal_on(self.device.name, member, 0, place.grow(margin), channels=2)
        return streaming.spread(self.net, gates, noise.transpose(0, 1))[:, 0]

    def flops(self) -> int:
        (z, y, x), depth = self.tiling.core, self.tiling.shape[0]
        margin, edge = 2 * streaming.features_margin(self.net), 2 * streaming.NOISE_MARGIN

        def run(net: slab.SlabNet) -> None:
            features = torch.empty(depth, 5, y + margin, x + margin)
            for _, _, fine, coarse in net.stream(lambda _: features, torch.empty(depth), self.mode.gap, depth):
                gates = streaming.gates(net, fine, coarse)
                for _ in range(self.members):
                    streaming.spread(net, gates, torch.empty(z + 2 * (net.DEEP // 2), 2, y + edge, x + edge))

        return count_flops(self.net, run)

    def memory(self) -> int:
        depth, height, width = self.tiling.shape
        streamed: int = self.net.BYTES_PER_PIXEL * min(self.device.step, depth) * height * width
        voxel: int = self.net.BYTES_PER_VOXEL + 4 * (1 + self.members)
        return streamed + voxel * prod(self.tiling.core)


class Restorer:
    """A SectionNet on sections: each with its window, one evaluation for the mean and a light pass for each member."""

    STEP = 1  # keeps its noise apart from that of a network that follows

    def __init__(self, net: SectionNet, sampling: Sampling, device: Device) -> None:
        self.net = net.to(device.name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.members, self.noise, self.device = sampling.members, NoiseField(sampling.seed), device

    def __call__(self, sections: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        """sections: [s, y, x], those of ``box`` and ``context`` more on either side; box: of the output, z counting
        sections -> mean [z, y, x], members [k, z, y, x]."""
        mean, members = self.device.empty(box.shape), self.device.empty((self.members, *box.shape))
        window = 2 * self.net.context + 1
        for z in range(box.shape[0]):  # a section at a time stays in the cache
            best, features = self.net.trunk(sections[None, z : z + window])
            mean[z] = best[0, 0]
            place = Box((box.start[0] + z, *box.start[1:]), (box.start[0] + z + 1, *box.stop[1:]))
            for k in range(self.members):
                noise = self.noise.normal_on(self.device.name, k, self.STEP, place, channels=2).transpose(0, 1)
                torch.add(mean[z], self.net.spread(features, noise)[0, 0], out=members[k, z])
        return mean, members

    def flops(self, planes: int, height: int, width: int) -> int:
        """Of so many sections of so many output pixels."""

        def run(net: SectionNet) -> None:
            sections = torch.empty(1, 2 * net.context + 1, height // net.factor, width // net.factor)
            _, features = net.trunk(sections)
            for _ in range(self.members):
                net.spread(features, torch.empty(1, 2, height, width))

        return planes * count_flops(self.net, run)

    def memory(self, planes: int, height: int, width: int) -> int:
        """Bytes held for so many, what is given back included."""
        pixel: int = self.net.BYTES_PER_PIXEL + 4 * planes * (1 + self.members)
        return height * width * pixel


class SectionPredictor:
    """Our network for sections: what one plane needs is a few sections, each tile exact to its core."""

    CORE: Triple = (16, 256, 256)
    batch = 1
    lost = 0
    evaluations = 1

    def __init__(self, net: SectionNet, mode: SectionWise, sampling: Sampling, device: Device) -> None:
        stride, halo = net.STRIDE * net.factor, net.HALO * net.factor
        core = sampling.tile or self.CORE
        self.tiling = exact_tiling(core, (0, halo, halo), (1, stride, stride), mode)
        self.restore, self.members = Restorer(net, sampling, device), sampling.members

    def __call__(self, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
        (tile,) = tiles
        device = self.restore.device
        with device.running():
            mean, members = self.restore(device.put(tile.sections), tile.box)
        core = Box.of(self.tiling.core).shift(self.tiling.halo).slices()
        return mean[core][None], members[(slice(None), *core)][None]

    def flops(self) -> int:
        return self.restore.flops(*self.tiling.shape)

    def memory(self) -> int:
        return self.restore.memory(*self.tiling.shape)


class ChainPredictor:
    """Sections restored, then planes predicted between them. The mean of a plane comes from the sections' means; member
    k from the sections' members k, so their uncertainty is carried on, and what is uncertain between sections is added.

    Members leave with both networks' calibrations in them: their spread is the uncertainty as stored.
    """

    batch = 1
    lost = 0
    evaluations = 1

    def __init__(self, first: Weights, then: Weights, mode: Chain, sampling: Sampling, device: Device) -> None:
        restoring: Any = first.net
        between: Any = then.net
        fine = restoring.STRIDE * mode.lateral
        stride = (1, lcm(fine, slab.STRIDE[1]), lcm(fine, slab.STRIDE[2]))
        self.then = SlabPredictor(between, mode.then, sampling, device, stride)
        self.restore = Restorer(restoring, sampling, device)
        self.mode, self.tiling, self.members = mode, self.then.tiling, sampling.members
        self.halo = mode.halo * mode.lateral
        self.first_scale = first.calibrated_scale(float(mode.lateral), sampling.members)
        self.scales = span_scales(then, mode.then, sampling.members)

    def __call__(self, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
        (tile,) = tiles
        device, context, halo = self.then.device, self.mode.first.context, self.halo
        box = self._restored(tile.box)
        inner = (slice(None), slice(halo, -halo), slice(halo, -halo))
        core = self.tiling.reach_of(tile.box)
        planes, y, x = core.slices(tile.box.start)
        spans = self.mode.axial.span(np.arange(core.start[0], core.stop[0]))
        scales = device.put(np.array([self.scales[int(n)] for n in spans], np.float32))[:, None, None]
        on = torch.from_numpy(np.flatnonzero(tile.t[planes] == 0))
        number = torch.from_numpy(tile.index[planes] - context)[on]
        with device.running():
            whole, drawn = self.restore(device.put(tile.sections), box)
            sections = whole[inner].contiguous()
            mean, members = device.empty(core.shape), device.empty((self.members, *core.shape))
            for part, best, _ in self.then.evaluate(sections, tile, context):
                mean[part] = best
            mean[on] = sections[number][:, y, x]
            for k in range(self.members):
                own = torch.lerp(sections, drawn[k][inner], self.first_scale)
                for part, best, gates in self.then.evaluate(own, tile, context):
                    members[k, part] = best + scales[part] * self.then.spread(gates, k, tile.box, part)
                members[k, on] = own[number][:, y, x]
        return mean[None], members[None]

    def _restored(self, box: Box) -> Box:
        """Sections, and their pixels, that are restored for the tile whose input box this is."""
        return self.mode.then.read_box(box).grow((0, self.halo, self.halo))

    def flops(self) -> int:
        shape = self._restored(Box.of(self.tiling.shape)).shape
        return self.restore.flops(*shape) + self.then.flops() * (1 + self.members)

    def memory(self) -> int:
        return self.then.memory() + self.restore.memory(*self._restored(Box.of(self.tiling.shape)).shape)


def exact_tiling(core: Triple, halo: Triple, stride: Triple, mode: Mode) -> Tiling:
    """Raises GeometryError for a tile that is not a multiple of what the network works in."""
    if any(n < 1 or n % s for n, s in zip(core, stride, strict=True)):
        raise GeometryError(f"tile {core} is not a multiple of {stride}, as the network needs")
    return Tiling(core, halo).fitted(mode.output_shape, stride)


class PlanePredictor:
    """The published networks: each plane on its own, ``steps`` evaluations for each member, the mean their average."""

    CORE: Triple = (1, 224, 224)
    BYTES_PER_PIXEL = 4000
    BATCH = 4
    lost = 1

    def __init__(self, net: UNet, mode: Mode, sampling: Sampling, device: Device) -> None:
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
        self.mode, self.factor = mode, int(factor)
        self.members, self.noise, self.device = sampling.members, NoiseField(sampling.seed), device
        # A CPU takes 25 % longer for four tiles of 256 x 256 together than for one after the other (measured).
        self.batch = 1 if device.name == "cpu" else self.BATCH
        self.sampler = SAMPLERS[sampling.sampler]
        steps = sampling.steps
        # The published schedule for the published sampler; any other stays inside the noise levels seen in training.
        self.schedule = published_test(steps) if sampling.sampler == "ancestral" else uniform_log_snr(steps)
        self.evaluations = steps * sampling.members

    def __call__(self, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
        padded = tiles + [tiles[-1]] * (self.batch - len(tiles))
        condition, index = self._condition(padded)

        def eps(y: Tensor, gamma: float) -> Tensor:
            level = torch.full((len(padded),), gamma, device=y.device)
            result: Tensor = self.net(torch.cat([condition, y], dim=1), level, index)
            return result.float()

        members = self.device.empty((len(tiles), self.members, *self.tiling.shape))
        with self.device.running():
            for k in range(self.members):

                def noise(step: int, member: int = k) -> Tensor:
                    fields = [self.noise.normal_on(self.device.name, member, step, tile.box)[0] for tile in padded]
                    return torch.stack(fields)

                members[:, k] = self.sampler(eps, noise, self.schedule)[: len(tiles)]
        return members.mean(dim=1), members

    def _condition(self, tiles: list[Tile]) -> tuple[Tensor, Tensor | None]:
        """-> [n, c, y, x], and for each plane between sections its number."""
        put = self.device.put
        if isinstance(self.mode, SectionWise):
            return torch.cat([_upsampled(put(tile.sections), tile.box, self.mode.lateral) for tile in tiles]), None
        # Order as published: the section with the higher number first.
        pairs = np.stack([tile.sections[tile.index[0] + np.array([1, 0])] for tile in tiles])
        # Where sections are bridged a plane may lie nearer to one than any of the planes the network knows.
        number = np.array([round(float(tile.t[0]) * self.factor) - 1 for tile in tiles]).clip(0, self.factor - 2)
        return put(pairs), put(number)

    def flops(self) -> int:
        _, y, x = self.tiling.shape

        def run(net: UNet) -> None:
            pair = net.channel_embed is not None
            index = torch.empty(1, dtype=torch.long) if pair else None
            net(torch.empty(1, 3 if pair else 2, y, x), torch.empty(1), index)

        return count_flops(self.net, run) * self.evaluations

    def memory(self) -> int:
        return self.batch * prod(self.tiling.shape) * (self.BYTES_PER_PIXEL + 8 * self.members)


def _upsampled(sections: Tensor, box: Box, lateral: int) -> Tensor:
    """[1, y, x] input pixels under ``box`` -> [1, 1, y, x] pixels of ``box``, bilinear as published."""
    if lateral == 1:
        return sections[None]
    fine = torch.nn.functional.interpolate(sections[None], scale_factor=lateral, mode="bilinear", align_corners=False)
    (y, x), (_, height, width) = (n % lateral for n in box.start[1:]), box.shape
    return fine[..., y : y + height, x : x + width]


def count_flops(net: torch.nn.Module, run: Any) -> int:
    """Count on shapes alone: nothing is computed."""
    from copy import deepcopy

    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        run(deepcopy(net).to("meta"))
    return int(counter.get_total_flops())


def span_scales(weights: Weights, mode: Mode, members: int) -> dict[int, float]:
    """What the members' spread is to be multiplied by, for each span of good sections that occurs and for 1; in a chain
    by 1, as the predictor does it.

    Where sections are farther apart than the network knows, their spread is that of ``mode.widest``, and it is scaled
    by the square root of the rest. This extrapolates how errors grow: those of linear interpolation in FIB-25 are 12.2,
    18.5, 22.6 and 27.2 greys for sections 5, 10, 15 and 20 pixels apart.
    """

    def scale(span: int) -> float:
        known = min(span * mode.gap, max(mode.widest, mode.gap))
        return weights.calibrated_scale(known, members) * sqrt(span * mode.gap / known)

    return {span: 1.0 if isinstance(mode, Chain) else scale(span) for span in {1, *mode.axial.spans}}
