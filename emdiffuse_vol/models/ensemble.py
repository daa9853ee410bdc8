"""SlabEnsemble: one mean from several SlabNets and the eight symmetries of a section.

Convention: as in ``slab``. The mean is the average over all networks and over sections turned by quarter turns and
mirrored, turned back. So it commutes with these symmetries exactly, where one network does so only as far as it has
learnt to, and errors that the evaluations do not share average out. Members come from the first network's stochastic
path, unturned, around that mean. Reach and stride are SlabNet's, and so is the freedom from seams: tiles are multiples
of the stride, so a turned tile meets the same grid. Cost: networks * turns times the trunk, about 1.3e5 FLOP per voxel
each, and one light stochastic path per member.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from emdiffuse_vol.models import streaming
from emdiffuse_vol.models.slab import SlabNet


def turn(x: Tensor, number: int) -> Tensor:
    """One of the eight symmetries of the last two axes: ``number`` % 4 quarter turns, mirrored for 4 and above."""
    x = torch.rot90(x, number % 4, (-2, -1))
    return x.flip(-1) if number >= 4 else x


def turn_back(x: Tensor, number: int) -> Tensor:
    x = x.flip(-1) if number >= 4 else x
    return torch.rot90(x, -(number % 4), (-2, -1))


class SlabEnsemble(SlabNet):
    """``networks`` SlabNets of one size; ``turns`` of the eight symmetries, 1, 4 or 8."""

    BYTES_PER_VOXEL = 4  # the sum of means

    def __init__(self, width: int = 32, deep: int = 96, blocks: int = 2, networks: int = 1, turns: int = 8) -> None:
        super().__init__(width, deep, blocks)
        self.turns = turns
        self.others = nn.ModuleList(SlabNet(width, deep, blocks) for _ in range(networks - 1))

    def trunk(self, features: Tensor, t: Tensor, gap: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As SlabNet's; fine and coarse features are the first network's, unturned."""
        total = torch.zeros_like(features[:, :1])
        for net, number in self._evaluations():
            turned = turn(features, number).contiguous(memory_format=torch.channels_last_3d)
            total += turn_back(SlabNet.trunk(net, turned, t, gap)[0], number)
        # Last, so that its features are not held while the others run.
        mean, fine, coarse = super().trunk(features, t, gap)
        return (total + mean) / (self.turns * (1 + len(self.others))), fine, coarse

    def stream(self, features: streaming.Features, t: Tensor, gap: float | Tensor, step: int) -> streaming.Planes:
        sums: dict[int, Tensor] = {}
        for net, number in self._evaluations():
            for planes, mean, *_ in SlabNet.stream(net, partial(_turned, features, number), t, gap, step):
                sums[planes.start] = turn_back(mean, number) + sums.get(planes.start, 0.0)
        for planes, mean, fine, coarse in super().stream(features, t, gap, step):
            total = mean + sums.get(planes.start, 0.0)
            yield planes, total / (self.turns * (1 + len(self.others))), fine, coarse

    def _evaluations(self) -> Iterator[tuple[SlabNet, int]]:
        """Networks and turns, but for the first network unturned."""
        for number in range(self.turns):
            for net in (*self.others, *([self] if number else [])):
                assert isinstance(net, SlabNet)
                yield net, number


def _turned(features: streaming.Features, number: int, planes: slice) -> Tensor:
    return turn(features(planes), number)
