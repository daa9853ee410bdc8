"""The published U-Net, against a second writing of it from its description: plain arithmetic on a state dict.

Nothing below is shared with the implementation. Convolutions are torch's; everything else is spelled out.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from emdiffuse_vol.errors import GeometryError
from emdiffuse_vol.models.unet import UNet, sinusoid

State = dict[str, Tensor]
# (input channels, output channels, change of resolution) of the residual blocks of each stage.
INPUT = [
    [(32, 32, "")],
    [(32, 32, "")],
    [(32, 32, "down")],
    [(32, 64, "")],
    [(64, 64, "")],
    [(64, 64, "down")],
    [(64, 128, "")],
    [(128, 128, "")],
    [(128, 128, "down")],
    [(128, 256, "")],
    [(256, 256, "")],
]
OUTPUT = [
    [(512, 256, "")],
    [(512, 256, "")],
    [(384, 256, ""), (256, 256, "up")],
    [(384, 128, "")],
    [(256, 128, "")],
    [(192, 128, ""), (128, 128, "up")],
    [(192, 64, "")],
    [(128, 64, "")],
    [(96, 64, ""), (64, 64, "up")],
    [(96, 32, "")],
    [(64, 32, "")],
    [(64, 32, "")],
]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def embedded(state: State, name: str, value: float) -> Tensor:
    """One number -> [128]."""
    frequencies = [10000 ** (-k / 16) for k in range(16)]
    features = torch.tensor([math.cos(value * f) for f in frequencies] + [math.sin(value * f) for f in frequencies])
    hidden = silu(state[f"{name}.0.weight"] @ features + state[f"{name}.0.bias"])
    return state[f"{name}.2.weight"] @ hidden + state[f"{name}.2.bias"]


def normed(state: State, name: str, x: Tensor) -> Tensor:
    groups = x.reshape(32, -1)
    centred = groups - groups.mean(1, keepdim=True)
    unit = (centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
    return unit * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def convolved(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x[None], weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)[0]


def resized(x: Tensor, how: str) -> Tensor:
    if how == "down":
        return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    return x.repeat_interleave(2, 1).repeat_interleave(2, 2) if how == "up" else x


def residual(state: State, name: str, x: Tensor, embedding: Tensor, how: str) -> Tensor:
    h = resized(silu(normed(state, f"{name}.in_layers.0", x)), how)
    h = convolved(state, f"{name}.in_layers.2", h)
    film = state[f"{name}.emb_layers.1.weight"] @ silu(embedding) + state[f"{name}.emb_layers.1.bias"]
    scale, shift = film[: len(h), None, None], film[len(h) :, None, None]
    h = normed(state, f"{name}.out_layers.0", h) * (1 + scale) + shift
    h = convolved(state, f"{name}.out_layers.3", silu(h))
    x = resized(x, how)
    return h + (x if len(x) == len(h) else convolved(state, f"{name}.skip_connection", x))


def attended(state: State, name: str, x: Tensor) -> Tensor:
    tokens = normed(state, f"{name}.norm", x).reshape(256, -1)
    qkv = state[f"{name}.qkv.weight"][:, :, 0] @ tokens + state[f"{name}.qkv.bias"][:, None]
    heads = []
    for head in range(8):
        q, k, v = (qkv[96 * head + 32 * part :][:32] for part in range(3))
        scores = torch.exp((q * 32**-0.25).T @ (k * 32**-0.25))  # [to, from]
        heads.append(v @ (scores / scores.sum(1, keepdim=True)).T)
    out = state[f"{name}.proj_out.weight"][:, :, 0] @ torch.cat(heads) + state[f"{name}.proj_out.bias"][:, None]
    return x + out.reshape(x.shape)


def reference(state: State, x: Tensor, gamma: float, index: int | None) -> Tensor:
    """One plane [c, y, x] through the network."""
    embedding = embedded(state, "cond_embed", gamma)
    if index is not None:
        embedding = torch.cat([embedding, embedded(state, "channel_embed", index)])
    x = convolved(state, "input_blocks.0.0", x)
    skips = [x]
    for number, ((_, _, how),) in enumerate(INPUT, start=1):
        x = residual(state, f"input_blocks.{number}.0", x, embedding, how)
        skips.append(x)
    x = residual(state, "middle_block.0", x, embedding, "")
    x = attended(state, "middle_block.1", x)
    x = residual(state, "middle_block.2", x, embedding, "")
    for number, stage in enumerate(OUTPUT):
        x = torch.cat([x, skips.pop()])
        for place, (_, _, how) in enumerate(stage):
            x = residual(state, f"output_blocks.{number}.{place}", x, embedding, how)
    return convolved(state, "out.2", silu(normed(state, "out.0", x)))


@pytest.fixture(scope="module", params=[True, False], ids=["vEM", "2D"])
def net(request: pytest.FixtureRequest) -> UNet:
    """Random weights everywhere, norms and biases too, so that nothing wrong can hide behind a 0 or a 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(in_channels=3 if request.param else 2, slices=request.param)
        with torch.no_grad():
            for vector in (parameter for parameter in net.parameters() if parameter.ndim == 1):
                vector.add_(torch.randn_like(vector), alpha=0.3)
    return net.eval().requires_grad_(False)


def sizes(in_channels: int, slices: bool) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in UNet(in_channels, slices).state_dict().items()}


@pytest.mark.parametrize(
    ("in_channels", "slices", "total", "tensors"), [(3, True, 16615873, 330), (2, False, 15677345, 326)]
)
def test_parameters_are_as_many_as_published(in_channels: int, slices: bool, total: int, tensors: int) -> None:
    shapes = sizes(in_channels, slices).values()
    assert (sum(map(math.prod, shapes)), len(shapes)) == (total, tensors)


@pytest.mark.parametrize(("in_channels", "slices"), [(3, True), (2, False)])
def test_a_tile_of_256_costs_104_gflop(in_channels: int, slices: bool) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        index = torch.zeros(1) if slices else None
        UNet(in_channels, slices)(torch.zeros(1, in_channels, 256, 256), torch.zeros(1), index)
    assert counter.get_total_flops() / 1e9 == pytest.approx(103.8, abs=0.05)


def test_names_and_shapes_are_those_of_the_released_files() -> None:
    found = sizes(3, True)
    named = {
        "input_blocks.0.0.weight": (32, 3, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (64, 32, 1, 1),
        "middle_block.1.norm.weight": (256,),
        "middle_block.1.qkv.weight": (768, 256, 1),
        "middle_block.1.proj_out.weight": (256, 256, 1),
        "cond_embed.0.weight": (128, 32),
        "channel_embed.2.weight": (128, 128),
        "out.0.bias": (32,),
        "out.2.weight": (1, 32, 3, 3),
    }
    for prefix, stages, start in (("input_blocks", INPUT, 1), ("output_blocks", OUTPUT, 0)):
        for number, stage in enumerate(stages, start):
            for place, (cin, cout, _) in enumerate(stage):
                block = f"{prefix}.{number}.{place}"
                named[f"{block}.in_layers.0.weight"] = (cin,)
                named[f"{block}.in_layers.2.weight"] = (cout, cin, 3, 3)
                named[f"{block}.emb_layers.1.weight"] = (2 * cout, 256)
                named[f"{block}.out_layers.0.weight"] = (cout,)
                named[f"{block}.out_layers.3.weight"] = (cout, cout, 3, 3)
    assert {key: found.get(key) for key in named} == named
    assert not any(key.startswith("channel_embed") for key in sizes(2, False))


def test_embedding_is_cosines_then_sines_of_the_raw_value() -> None:
    (features,) = sinusoid(torch.tensor([3]))
    slowest = 3 * 10000 ** (-15 / 16)
    assert features[[0, 15, 16, 31]].tolist() == pytest.approx(
        [math.cos(3), math.cos(slowest), math.sin(3), math.sin(slowest)], rel=1e-5
    )


def test_network_equals_its_description(net: UNet) -> None:
    state = net.state_dict()
    slices = net.channel_embed is not None
    planes = torch.randn(2, 3 if slices else 2, 16, 24, generator=torch.Generator().manual_seed(1))
    gammas, indices = [0.9, 4.39e-5], [0, 3]
    found = net(planes, torch.tensor(gammas), torch.tensor(indices) if slices else None)
    for n in range(2):
        expected = reference(state, planes[n], gammas[n], indices[n] if slices else None)
        torch.testing.assert_close(found[n], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_noise_level_and_slice_index_matter(net: UNet) -> None:
    slices = net.channel_embed is not None
    plane = torch.randn(1, 3 if slices else 2, 8, 8, generator=torch.Generator().manual_seed(2)).expand(3, -1, -1, -1)
    found = net(plane, torch.tensor([0.5, 0.9, 0.5]), torch.tensor([0, 0, 1]) if slices else None)
    assert not torch.allclose(found[0], found[1], rtol=1e-3)
    assert torch.allclose(found[0], found[2], rtol=1e-3) != slices


def test_a_tile_that_does_not_halve_three_times_is_refused(net: UNet) -> None:
    channels = 3 if net.channel_embed is not None else 2
    with pytest.raises(GeometryError, match=r"\(8, 12\) pixels; .* multiples of 8"):
        net(torch.zeros(1, channels, 8, 12), torch.ones(1))


def test_the_slice_index_is_given_exactly_when_it_is_an_input(net: UNet) -> None:
    slices = net.channel_embed is not None
    with pytest.raises(ValueError, match="slice index"):
        net(torch.zeros(1, 3 if slices else 2, 8, 8), torch.ones(1), None if slices else torch.zeros(1))
