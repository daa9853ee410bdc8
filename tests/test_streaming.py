"""A tile a few planes at a time is the tile at once, without the margins."""

from __future__ import annotations

import pytest
import torch
from networks import random_slab
from test_slab import random_state
from torch import Tensor

from emdiffuse_vol.models import streaming
from emdiffuse_vol.models.ensemble import SlabEnsemble
from emdiffuse_vol.models.plane import PlaneNet
from emdiffuse_vol.models.slab import HALO, SlabNet

Z, Y, X = CORE = 7, 16, 24


def filled(net: SlabNet) -> SlabNet:
    net.load_state_dict(random_state(net))
    return net


NETS = {
    "slab": random_slab(),
    "plane": filled(PlaneNet(8, 12)),
    "ensemble": filled(SlabEnsemble(8, 12, networks=2, turns=4)),
}


def whole(net: SlabNet, features: Tensor, noise: Tensor, t: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: mean and member of a tile [1, c, z, y, x], cropped to its core."""
    mean, fine, coarse = net.trunk(features, t, gap)
    _, y, x = HALO
    inner = (0, 0, slice(net.HALO[0], net.HALO[0] + Z), slice(y, -y), slice(x, -x))
    return mean[inner], net.spread(net.gates(fine, coarse), noise)[inner]


def streamed(net: SlabNet, features: Tensor, noise: Tensor, t: Tensor, gap: Tensor, step: int) -> tuple[Tensor, Tensor]:
    def around(x: Tensor, margin: int) -> Tensor:
        cut = HALO[1] - margin
        return x[0, ..., cut:-cut, cut:-cut].transpose(0, 1)

    given, grain = around(features, streaming.features_margin(net)), around(noise, streaming.NOISE_MARGIN)
    result, (halo, reach) = torch.empty(2, *CORE), (net.HALO[0], net.DEEP // 2)
    for planes, mean, fine, coarse in net.stream(lambda planes: given[planes], t, gap, step):
        needed = slice(planes.start + halo - reach, planes.stop + halo + reach)
        result[0, planes] = mean[:, 0]
        result[1, planes] = streaming.spread(net, streaming.gates(net, fine, coarse), grain[needed])[:, 0]
    return result[0], result[1]


def inputs(net: SlabNet) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z, y, x = (n + 2 * h for n, h in zip(CORE, net.HALO, strict=True))
    features, noise = (torch.randn(1, c, z, y, x, generator=generator) for c in (5, 2))
    return features, noise, torch.rand(z, generator=generator), 4 + torch.rand(z, generator=generator)


@pytest.mark.parametrize("name", NETS)
def test_a_stream_is_the_tile_at_once(name: str) -> None:
    net = NETS[name]
    given = inputs(net)
    with torch.inference_mode():
        expected = whole(net, *given)
        for step in (2, 100):
            for a, b in zip(streamed(net, *given, step), expected, strict=True):
                assert (a - b).abs().max() < 1e-5 * b.abs().max(), step


def test_bfloat16_differs_by_a_few_hundredths() -> None:
    """Its numbers have 8 bits; the mean is a sum of the sections, exact, and of what the network adds."""
    net = NETS["slab"]
    given = inputs(net)
    with torch.inference_mode():
        exact = streamed(net, *given, 4)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = streamed(net, *given, 4)
    linear = given[0][0, 0, net.HALO[0] : -net.HALO[0], HALO[1] : -HALO[1], HALO[2] : -HALO[2]]
    for a, b, added in zip(exact, rounded, (exact[0] - linear, exact[1]), strict=True):
        assert 0 < (a - b).square().mean().sqrt() < 0.02 * added.square().mean().sqrt()
