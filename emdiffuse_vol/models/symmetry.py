"""Whether a network treats the two sections of a gap alike: given them the other way round, it should give the planes
between them in the reverse order.

Tissue has no preferred direction along z, so a network that learned what lies between two sections mirrors. Weights
that saw the same section twice in training, or sections at another distance than they are used for, do not: planes
stay where they are as their index changes, or come back in order for another factor. Both have happened to versions of
the published code.

Convention. Planes between two sections are counted from the lower z, 1 to factor - 1. ``mismatch`` is the root mean
square difference of a plane and its mirror image, relative to that of the two sections themselves. ``position`` says
where on the way from the lower section to the higher one a plane lies in greys: 0 at the lower, 1 at the higher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from emdiffuse_vol.diffusion.samplers import dpm_solver_2m
from emdiffuse_vol.diffusion.schedules import uniform_log_snr
from emdiffuse_vol.errors import WeightsError
from emdiffuse_vol.models.checkpoints import Weights
from emdiffuse_vol.models.slab import SlabNet, slab_features
from emdiffuse_vol.models.unet import UNet

SECTIONS = 8  # that the check is given; the published network takes the middle two
SIZE = 96  # pixels along y and x; a multiple of what every network needs
STEPS = 10  # of the deterministic sampler, for networks that need one
# Rules of thumb: the embedded weights have a mismatch of 0.05 to 0.08, an untrained published network one of 1.8.
LIMIT = 0.3
MOVES = 0.5  # of the way that planes should move from one section to the other

Planes = Callable[[Tensor, int], Tensor]  # sections [s, y, x], how many planes -> [planes, y, x] of the middle gap


@dataclass(frozen=True)
class Symmetry:
    """mismatch, position: of each plane. factors: mean mismatch if the weights were of this factor or of its
    neighbours, where these can be asked. complaint: what is wrong, or None."""

    factor: int
    mismatch: list[float]
    position: list[float]
    factors: dict[int, float]
    complaint: str | None


def check_symmetry(weights: Weights, sections: Tensor, factor: int, gap: float, seed: int = 0) -> Symmetry:
    """sections: [8, SIZE, SIZE] normalised greys, ``gap`` lateral pixels apart. Raises WeightsError for a network that
    knows one section only."""
    net = weights.net
    if isinstance(net, SlabNet):
        return compare(lambda stack, _: slab_planes(net, stack, factor, gap), sections, factor, [factor])
    if isinstance(net, UNet) and net.channel_embed is not None:
        noise = torch.randn((1, *sections.shape[1:]), generator=torch.Generator().manual_seed(seed))
        asked = [f for f in (factor - 1, factor, factor + 1) if f >= 2]
        return compare(lambda stack, count: unet_planes(net, stack, count, noise), sections, factor, asked)
    raise WeightsError(f"weights {weights.name} see one section at a time: there is nothing along z to mirror")


def default_factor(weights: Weights) -> int:
    """The one that the weights serve, or 6 where they serve many. Raises WeightsError where they do not say."""
    if "factor" in weights.metadata:
        return int(weights.metadata["factor"])
    if weights.gaps is None:
        raise WeightsError(f"weights {weights.name} do not say which factor they serve; give --factor, such as 6")
    least, greatest = weights.gaps
    return max(2, min(max(6, math.ceil(least)), math.floor(greatest)))


def compare(planes: Planes, sections: Tensor, factor: int, factors: list[int]) -> Symmetry:
    """The planes of a stack beside those of the stack turned over."""
    count = max(factors) - 1
    there, back = planes(sections, count), planes(sections.flip(0), count)
    lower, higher = sections[len(sections) // 2 - 1], sections[len(sections) // 2]
    way = higher - lower
    scale = float(way.square().mean().sqrt()) or 1.0

    def mismatch(of: int) -> list[float]:
        differences = there[: of - 1] - back[: of - 1].flip(0)
        return [float(d) / scale for d in differences.square().mean(dim=(1, 2)).sqrt()]

    position = [float(((plane - lower) * way).mean()) / scale**2 for plane in there[: factor - 1]]
    means = {of: sum(mismatch(of)) / (of - 1) for of in factors}
    return Symmetry(factor, mismatch(factor), position, means, complaint(factor, position, means))


def complaint(factor: int, position: list[float], means: dict[int, float]) -> str | None:
    best = min(means, key=lambda of: means[of])
    if factor > 2 and position[-1] - position[0] < MOVES * (factor - 2) / factor:
        return (
            f"planes hardly move from one section to the other as their index grows (mismatch {means[factor]:.0%}), "
            "as those of weights that were trained with the same section on both sides, or not at all"
        )
    if best != factor and means[best] < LIMIT:
        return f"planes mirror as those of factor {best}, not {factor}; use --factor {best}, or other weights"
    if means[factor] >= LIMIT:
        return f"planes do not mirror: the mismatch is {means[factor]:.0%}, and below {LIMIT:.0%} is expected"
    return None


@torch.inference_mode()
def slab_planes(net: SlabNet, sections: Tensor, factor: int, gap: float) -> Tensor:
    """The mean of the planes between the middle two sections; two gaps on either side are predicted with them."""
    middle = len(sections) // 2 - 1
    number = torch.arange((middle - 2) * factor, (middle + 3) * factor)
    index, t = number // factor, (number % factor) / factor
    mean, _, _ = net.trunk(slab_features(sections[None], index, t), t, gap)
    return mean[0, 0, 2 * factor + 1 : 3 * factor]


@torch.inference_mode()
def unet_planes(net: UNet, sections: Tensor, count: int, noise: Tensor) -> Tensor:
    """Planes 0 to ``count`` - 1 between the middle two sections, all from the same ``noise``, without any other."""
    middle = len(sections) // 2 - 1
    # Order as published: the section with the higher number first.
    condition = sections[[middle + 1, middle]].expand(count, -1, -1, -1)
    index = torch.arange(count)

    def eps(y: Tensor, gamma: float) -> Tensor:
        result: Tensor = net(torch.cat([condition, y], dim=1), torch.full((count,), gamma), index)
        return result

    start = noise.expand(count, -1, -1, -1)
    return dpm_solver_2m(eps, lambda step: start, uniform_log_snr(STEPS))[:, 0]
