"""Small untrained networks for tests: random everywhere, so nothing is hidden behind zero-initialised layers."""

from __future__ import annotations

import torch

from emdiffuse_vol.models.slab import SlabNet


def random_slab(width: int = 8, deep: int = 12, seed: int = 0) -> SlabNet:
    generator = torch.Generator().manual_seed(seed)
    net = SlabNet(width, deep)
    with torch.no_grad():
        for name, p in net.named_parameters():
            fan = p[0].numel() if p.ndim > 1 else 100
            gain = 0.03 if "out" in name else 1.2  # the output stays within the greys that can be stored
            p.copy_(torch.randn(p.shape, generator=generator) * gain / fan**0.5)
    return net.eval().requires_grad_(False)
