"""SectionNet: one section restored from itself and its neighbours, with a spread: denoising and super-resolution.

Convention. Axes ``[n, c, y, x]``; the channels of the input are a window of ``2 * context + 1`` neighbouring sections,
in their order, and the middle one is what is restored. Greys are normalised to about [-1, 1] by one affine map per
volume. The output is finer by ``factor`` along y and x: pixel (0, 0) of the input covers its first ``factor`` x
``factor`` pixels. The mean is a residual over the middle section, brought to the finer grid bilinearly.

As in ``slab``, two outputs come from one trunk: the mean, trained as the best single guess, and members around it,
driven by white noise and trained by a proper score. No statistics over a tile and no attention: the trunk works at 1/2
and 1/4 of the input's resolution, so it commutes with shifts by ``STRIDE`` = 4 pixels of the input, and nothing depends
on what is farther than ``HALO`` = 32 of them. About 2.4e4 FLOP per pixel for the mean (factor 1, context 1) and 1.5e3
for each member.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from emdiffuse_vol.models.pointwise import Pointwise

CELL = 2  # pixels of the input along each axis that become channels


def _conv(cin: int, cout: int, kernel: int, zero: bool = False) -> nn.Conv2d:
    conv = Pointwise(cin, cout) if kernel == 1 else nn.Conv2d(cin, cout, kernel, padding=kernel // 2)
    if zero:
        nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class Block(nn.Module):
    """Residual block of two 3x3 convolutions, at first the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels, 3)
        self.second = _conv(channels, channels, 3, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.second(F.silu(self.first(F.silu(x))))
        return result


class SectionNet(nn.Module):
    """``width`` channels at half of the input's resolution, ``deep`` at a quarter, ``light`` in the stochastic path."""

    HALO = 32
    STRIDE = 4

    def __init__(self, context: int = 1, factor: int = 1, width: int = 24, deep: int = 48, light: int = 16) -> None:
        super().__init__()
        self.context, self.factor, self.cell = context, factor, CELL * factor
        # Of the output, held at the peak, as measured: six maps of ``width`` channels, and the images.
        self.BYTES_PER_PIXEL = 24 * width // self.cell**2 + 16
        self.inp = _conv((2 * context + 1) * CELL**2, width, 3)
        self.enter = Block(width)
        self.down = nn.Conv2d(width, deep, 2, stride=2)
        self.middle = nn.Sequential(Block(deep), Block(deep))
        self.up = _conv(deep, width, 1)
        self.leave = Block(width)
        self.out = _conv(width, self.cell**2, 3, zero=True)
        # The stochastic path: noise at two scales, gated by what the trunk knows.
        self.coarse_noise = _conv(2, light, 3)
        self.coarse_gate = _conv(deep, 2 * light, 1)
        self.fine_noise = _conv(self.cell**2, light, 3)
        self.fine_gate = _conv(width, 2 * light, 1)
        self.mix = _conv(light, light, 3)
        self.member_out = _conv(light, self.cell**2, 1)
        nn.init.uniform_(self.member_out.weight, -0.035, 0.035)

    def trunk(self, sections: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """sections: [n, 2 * context + 1, y, x], y and x multiples of ``STRIDE`` -> the mean [n, 1, factor * y,
        factor * x], and what the noise of every member is multiplied by and added to."""
        middle = sections[:, self.context : self.context + 1]
        if self.factor > 1:
            middle = F.interpolate(middle, scale_factor=self.factor, mode="bilinear", align_corners=False)
        h = self.enter(self.inp(F.pixel_unshuffle(sections, CELL)))
        coarse = self.middle(self.down(h))
        fine = F.silu(self.leave(h + F.interpolate(self.up(coarse), scale_factor=2, mode="nearest")))
        mean = middle + F.pixel_shuffle(self.out(fine), self.cell)
        return mean, (self.fine_gate(fine), self.coarse_gate(F.silu(coarse)))

    def spread(self, features: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
        """noise: [n, 2, factor * y, factor * x] standard normal -> [n, 1, ...], what one member adds to the mean."""
        fine_gate, coarse_gate = features
        # Channel 0 drives fine grain; both, summed over cells of two sizes, drive larger structure.
        wide = 2 * self.cell
        cells = F.avg_pool2d(noise, wide) * wide
        scale, shift = coarse_gate.chunk(2, dim=1)
        coarse = self.coarse_noise(cells) * (1 + scale) + shift
        scale, shift = fine_gate.chunk(2, dim=1)
        fine = self.fine_noise(F.pixel_unshuffle(noise[:, :1], self.cell))
        h = (fine + F.interpolate(coarse, scale_factor=2, mode="nearest")) * (1 + scale) + shift
        return F.pixel_shuffle(self.member_out(F.silu(self.mix(F.silu(h)))), self.cell)

    def forward(self, sections: Tensor) -> Tensor:
        """The mean alone."""
        mean: Tensor = self.trunk(sections)[0]
        return mean
