"""Small untrained networks for tests: random everywhere, so nothing is hidden behind zero-initialised layers."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from emdiffuse_vol.models.section import SectionNet
from emdiffuse_vol.models.slab import SlabNet

Net = TypeVar("Net", bound=nn.Module)


def random_slab(width: int = 8, deep: int = 12, seed: int = 0) -> SlabNet:
    return randomised(SlabNet(width, deep), seed)


def random_section(context: int = 1, factor: int = 1, seed: int = 1) -> SectionNet:
    return randomised(SectionNet(context, factor, width=8, deep=12, light=8), seed)


def randomised(net: Net, seed: int) -> Net:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            fan = p[0].numel() if p.ndim > 1 else 100
            gain = 0.03 if "out" in name else 1.2  # the output stays within the greys that can be stored
            p.copy_(torch.randn(p.shape, generator=generator) * gain / fan**0.5)
    return net.eval().requires_grad_(False)
