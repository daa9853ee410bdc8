"""SlabNet: every plane of a slab of the output predicted together, in one evaluation, with a spread.

Convention. The network lives on the *output* grid: axes ``[n, c, z, y, x]``, z the planes at the target spacing. Each
plane lies between two measured sections at relative position ``t`` in [0, 1); ``gap`` is the distance of the two in
lateral pixels, one number or one for each plane, so one checkpoint serves any factor, whole or fractional. Greys are
normalised to about [-1, 1] by one affine map per volume. The mean is a residual over linear interpolation of the two
nearest sections.

Two outputs from one trunk. ``mean`` is trained by squared error: the best single guess. ``member`` adds to it a
residual driven by white noise and trained by a proper scoring rule, so that members scatter as the truth does around
the mean. Averaging K samples would pay (1 + 1/K) of the noise; a regression output does not.

No seams by construction: no statistics over a tile, no attention. In XY the trunk works at 1/2 and 1/4 resolution, so
it commutes with shifts by multiples of ``STRIDE`` = 4 pixels in XY and of 1 plane in z, and an output voxel depends
on nothing farther than ``HALO`` = (4, 32, 32) voxels (tests/test_slab.py measures both). About 1.3e5 FLOP per voxel
for the mean and 7e3 for each member; ``emdvol reconstruct --dry-run`` prints the counted number.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emdiffuse_vol.models import streaming

STRIDE = (1, 4, 4)
HALO = (4, 32, 32)
EMBED = 64


def slab_features(sections: Tensor, index: Tensor, t: Tensor) -> Tensor:
    """Images the network sees at each output plane.

    sections: [n, s, y, x] measured sections; index: [z] the section at or below each plane, with one more section
    below and two above it present in ``sections``; t: [z] relative position in [0, 1).
    Returns [n, 5, z, y, x]: linear interpolation, nearest below and above, second below and above.
    """
    below2, below, above, above2 = (sections[:, index + k] for k in (-1, 0, 1, 2))
    linear = torch.lerp(below, above, t.to(sections.dtype)[:, None, None])
    return torch.stack([linear, below, above, below2, above2], dim=1)


def position_features(t: Tensor, gap: float | Tensor) -> Tensor:
    """[z] positions in gaps of ``gap`` (or [z]) lateral pixels -> [z, 8] smooth features of where a plane lies."""
    near = torch.minimum(t, 1 - t)
    waves = [torch.sin(math.pi * k * t) for k in (1, 2)] + [torch.cos(math.pi * k * t) for k in (1, 2)]
    size = gap.to(t) if isinstance(gap, Tensor) else torch.full_like(t, gap)
    return torch.stack([t - 0.5, *waves, near * size / 5, size / 10, torch.log(size / 6)], dim=-1)


def unshuffle(x: Tensor) -> Tensor:
    """[n, c, z, 2y, 2x] -> [n, 4c, z, y, x]: pixels of a 2x2 cell become channels."""
    n, c, z, y, w = x.shape
    cells = x.reshape(n, c, z, y // 2, 2, w // 2, 2)
    return cells.permute(0, 1, 4, 6, 2, 3, 5).reshape(n, 4 * c, z, y // 2, w // 2)


def shuffle(x: Tensor) -> Tensor:
    """Inverse of :func:`unshuffle`."""
    n, c, z, y, w = x.shape
    cells = x.reshape(n, c // 4, 2, 2, z, y, w)
    return cells.permute(0, 1, 4, 5, 2, 6, 3).reshape(n, c // 4, z, 2 * y, 2 * w)


def _conv(cin: int, cout: int, kernel: tuple[int, int, int], zero: bool = False) -> nn.Conv3d:
    z, y, x = kernel
    conv = nn.Conv3d(cin, cout, kernel, padding=(z // 2, y // 2, x // 2))
    if zero:
        nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")


class Block(nn.Module):
    """Residual block: 3x3x3 and 1x3x3 convolutions, modulated plane by plane by the position embedding (FiLM).
    ``deep`` is the first one's extent in z."""

    def __init__(self, channels: int, deep: int = 3) -> None:
        super().__init__()
        self.first = _conv(channels, channels, (deep, 3, 3))
        self.second = _conv(channels, channels, (1, 3, 3), zero=True)
        self.film = nn.Linear(EMBED, 2 * channels)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        # embedding: [z, e] -> scale, shift: [1, c, z, 1, 1]
        scale, shift = self.film(embedding).T[None, :, :, None, None].chunk(2, dim=1)
        h = self.first(F.silu(x)) * (1 + scale) + shift
        result: Tensor = x + self.second(F.silu(h))
        return result


class SlabNet(nn.Module):
    """The default network. ``width`` channels at half resolution, ``deep`` at a quarter."""

    DEEP = 3  # planes that a convolution spans
    # Held at the peak: of each plane that is streamed at once, and of the core; measured by benchmarks/memory.py.
    BYTES_PER_PIXEL, BYTES_PER_VOXEL = 900, 0

    def __init__(self, width: int = 32, deep: int = 96, blocks: int = 2) -> None:
        super().__init__()
        side = -(-(14 + 8 * blocks) // STRIDE[1]) * STRIDE[1]
        self.HALO = (self.DEEP // 2 * (2 + blocks), side, side)
        self.embed = nn.Sequential(nn.Linear(8, EMBED), nn.SiLU(), nn.Linear(EMBED, EMBED), nn.SiLU())
        self.inp = _conv(20, width, (1, 3, 3))
        self.enter = Block(width, self.DEEP)
        self.down = nn.Conv3d(width, deep, (1, 2, 2), stride=(1, 2, 2))
        self.middle = nn.ModuleList(Block(deep, self.DEEP) for _ in range(blocks))
        self.up = _conv(deep, width, (1, 1, 1))
        self.leave = Block(width, self.DEEP)
        self.out = _conv(width, 4, (1, 3, 3), zero=True)
        # The stochastic path: noise at two scales, gated by what the trunk knows.
        self.coarse_noise = _conv(2, width // 2, (self.DEEP, 3, 3))
        self.coarse_gate = _conv(deep, width, (1, 1, 1))
        self.coarse_up = _conv(width // 2, width, (1, 1, 1))
        self.fine_noise = _conv(4, width, (self.DEEP, 3, 3))
        self.fine_gate = _conv(width, 2 * width, (1, 1, 1))
        self.mix = _conv(width, width, (1, 3, 3))
        self.member_out = _conv(width, 4, (1, 1, 1))
        # Standard deviation 0.02; uniform, as normal_ loads the whole compiler where a network is built without values.
        nn.init.uniform_(self.member_out.weight, -0.035, 0.035)

    def embedding(self, t: Tensor, gap: float | Tensor) -> Tensor:
        """Of each plane: [z] -> [z, e]."""
        result: Tensor = self.embed(position_features(t, gap))
        return result

    def stream(self, features: streaming.Features, t: Tensor, gap: float | Tensor, step: int) -> streaming.Planes:
        """:meth:`trunk`, a few planes at a time: see :func:`streaming.trunk`."""
        return streaming.trunk(self, features, t, gap, step)

    def trunk(self, features: Tensor, t: Tensor, gap: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """features: [n, 5, z, y, x] of :func:`slab_features` -> (mean [n, 1, z, y, x], fine, coarse features)."""
        embedding = self.embedding(t, gap)
        h = self.enter(self.inp(unshuffle(features)), embedding)
        coarse = self.down(h)
        for block in self.middle:
            coarse = block(coarse, embedding)
        fine = self.leave(h + _double(self.up(coarse)), embedding)
        mean = features[:, :1] + shuffle(self.out(F.silu(fine)))
        return mean, fine, coarse

    def gates(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """What the noise of every member is multiplied by and added to: computed once, used by all members."""
        return self.fine_gate(F.silu(fine)), self.coarse_gate(F.silu(coarse))

    def spread(self, gates: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
        """noise: [n, 2, z, y, x] standard normal -> [n, 1, z, y, x], what one member adds to the mean."""
        fine_gate, coarse_gate = gates
        # Channel 0 drives fine grain; channel 1, summed over cells of 2x2 and 4x4 pixels, drives larger structure.
        pooled = F.avg_pool3d(noise[:, 1:], (1, 4, 4)) * 4
        cells = torch.cat([pooled, F.avg_pool3d(noise[:, :1], (1, 4, 4)) * 4], dim=1)
        scale, shift = coarse_gate.chunk(2, dim=1)
        h = self.coarse_up(F.silu(self.coarse_noise(cells) * (1 + scale) + shift))
        scale, shift = fine_gate.chunk(2, dim=1)
        h = (self.fine_noise(unshuffle(noise[:, :1])) + _double(h)) * (1 + scale) + shift
        return shuffle(self.member_out(F.silu(self.mix(F.silu(h)))))
