"""UNet: the published EMDiffuse network for all four tasks (Lu et al. 2024, doi:10.1038/s41467-024-49125-z).

Convention. One plane at a time: axes ``[n, c, y, x]``, y and x multiples of ``STRIDE``, greys in [-1, 1]. Channels of
the input are the condition, then the noisy plane: [condition, noisy] for EMDiffuse-n and -r (``slices=False``), or
[below, above, noisy] for vEMDiffuse, ``below`` being the section of the higher z. The output is the estimate of the
noise in the noisy plane. ``gamma`` is the share of signal power, the cumulative product of 1 - beta, in (0, 1);
``index`` counts the missing planes from the section ``above``, 0 the nearest to it.

Names and order of the parameters are those of the released files without their prefix ``denoise_fn.``, and so of
guided-diffusion, where this network comes from. A gap of R means R - 1 indices and is not an input: one set of
weights serves the one factor it was trained on. Statistics and attention span the tile: every output pixel sees all
of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emdiffuse_vol.errors import GeometryError

STRIDE = 8
WIDTHS = (32, 64, 128, 256)
BLOCKS = 2
GROUPS = 32
HEAD = 32
EMBED = 128
DROPOUT = 0.2

Resize = Callable[[Tensor], Tensor]


def sinusoid(value: Tensor, dim: int = WIDTHS[0]) -> Tensor:
    """[n] -> [n, dim]: cosines, then sines, of ``value`` times frequencies falling from 1 towards 1/10000."""
    half = dim // 2
    powers = torch.arange(half, dtype=torch.float32, device=value.device) / half
    angle = value.float()[:, None] * torch.exp(-math.log(10000) * powers)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def _keep(x: Tensor) -> Tensor:
    return x


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _conv(cin: int, cout: int) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, padding=1)


def _embedding() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTHS[0], EMBED), nn.SiLU(), nn.Linear(EMBED, EMBED))


class ResBlock(nn.Module):
    """Two convolutions; the embedding scales and shifts the second normalisation; ``resize`` acts on both branches."""

    def __init__(self, cin: int, cout: int, embed: int, resize: Resize = _keep) -> None:
        super().__init__()
        self.resize = resize
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, cin), nn.SiLU(), _conv(cin, cout))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed, 2 * cout))
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, cout), nn.SiLU(), nn.Dropout(DROPOUT), _conv(cout, cout))
        self.skip_connection = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activate, conv = self.in_layers
        h = conv(self.resize(activate(norm(x))))
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, dim=1)
        norm, activate, dropout, conv = self.out_layers
        h = conv(dropout(activate(norm(h) * (1 + scale) + shift)))
        total: Tensor = self.skip_connection(self.resize(x)) + h
        return total


class Attention(nn.Module):
    """Residual self-attention over all positions of the plane."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        # The channels are cut into heads first, and each head into its q, k and v: "legacy" order.
        heads = self.qkv(self.norm(flat)).unflatten(1, (-1, 3, HEAD)).transpose(-1, -2)  # [n, head, 3, tokens, HEAD]
        mixed = F.scaled_dot_product_attention(*heads.unbind(2)).transpose(-1, -2).flatten(1, 2)
        attended: Tensor = flat + self.proj_out(mixed)
        return attended.view_as(x)


class Stage(nn.ModuleList):
    """Layers one after the other, those that want it given the embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """``in_channels`` counts the condition and the noisy plane; ``slices`` adds the embedding of the slice index;
    ``difficulty`` a second head for training, the logarithm of how hard each pixel is (released files have none)."""

    def __init__(self, in_channels: int, slices: bool, difficulty: bool = False) -> None:
        super().__init__()
        embed = 2 * EMBED if slices else EMBED
        last = len(WIDTHS) - 1
        self.cond_embed = _embedding()
        self.channel_embed = _embedding() if slices else None
        self.input_blocks = nn.ModuleList([Stage([_conv(in_channels, WIDTHS[0])])])
        self.output_blocks = nn.ModuleList()
        channels = WIDTHS[0]
        skips = [channels]
        for level, width in enumerate(WIDTHS):
            for _ in range(BLOCKS):
                self.input_blocks.append(Stage([ResBlock(channels, width, embed)]))
                channels = width
                skips.append(channels)
            if level < last:
                self.input_blocks.append(Stage([ResBlock(channels, channels, embed, _halve)]))
                skips.append(channels)
        self.middle_block = Stage(
            [ResBlock(channels, channels, embed), Attention(channels), ResBlock(channels, channels, embed)]
        )
        for level, width in reversed(list(enumerate(WIDTHS))):
            for block in range(BLOCKS + 1):
                stage = Stage([ResBlock(channels + skips.pop(), width, embed)])
                channels = width
                if level > 0 and block == BLOCKS:
                    stage.append(ResBlock(channels, channels, embed, _double))
                self.output_blocks.append(stage)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), _conv(channels, 1))
        self.out_difficulty: nn.Sequential | None = None
        if difficulty:
            self.out_difficulty = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), _conv(channels, 1))

    def forward(self, x: Tensor, gamma: Tensor, index: Tensor | None = None) -> Tensor:
        """x: [n, in_channels, y, x], gamma: [n], index: [n] for ``slices`` only -> noise [n, 1, y, x]."""
        noise: Tensor = self.out(self.features(x, gamma, index))
        return noise

    def features(self, x: Tensor, gamma: Tensor, index: Tensor | None = None) -> Tensor:
        """What the heads see: [n, 32, y, x]."""
        if x.shape[-2] % STRIDE or x.shape[-1] % STRIDE:
            raise GeometryError(f"tile of {tuple(x.shape[-2:])} pixels; the U-Net needs multiples of {STRIDE}")
        if (index is None) != (self.channel_embed is None):
            raise ValueError("the slice index is an input of vEMDiffuse networks, and of no other")
        embedding = self.cond_embed(sinusoid(gamma))
        if self.channel_embed is not None and index is not None:
            embedding = torch.cat([embedding, self.channel_embed(sinusoid(index))], dim=-1)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), embedding)
        return x
