"""What SlabNet's docstring claims: how far it sees, what it commutes with, what it costs."""

from __future__ import annotations

import pytest
import torch
from networks import random_slab
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from emdiffuse_vol.models.ensemble import SlabEnsemble, turn, turn_back
from emdiffuse_vol.models.plane import PlaneNet
from emdiffuse_vol.models.slab import HALO, STRIDE, SlabNet, shuffle, slab_features, unshuffle

NET = random_slab()
Z, Y, X = 17, 84, 84


def run(features: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    mean, fine, coarse = NET.trunk(features, t, 6.0)
    return mean, mean + NET.spread(NET.gates(fine, coarse), noise)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 5, Z, Y, X, generator=generator)
    return features, torch.randn(1, 2, Z, Y, X, generator=generator), torch.rand(Z, generator=generator)


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("phase", [0, 1, 2, 3])
def test_a_voxel_depends_on_nothing_beyond_the_halo(output: int, phase: int) -> None:
    features, noise, t = inputs()
    features.requires_grad_()
    noise.requires_grad_()
    z, y, x = Z // 2, 40 + phase, 40 + phase
    run(features, noise, t)[output][0, 0, z, y, x].backward()
    reach = []
    for grad in (features.grad, noise.grad):
        if grad is None:
            continue
        seen = grad[0].abs().amax(0).nonzero() - torch.tensor([z, y, x])
        reach.append(seen.abs().amax(0))
    far = torch.stack(reach).amax(0)
    assert (far <= torch.tensor(HALO)).all(), far
    # ... and the halo is not needlessly wide.
    assert far[0] == HALO[0] and far[1] >= HALO[1] - 5, far


def test_it_commutes_with_shifts_by_its_stride() -> None:
    features, noise, t = inputs()
    first = run(features, noise, t)
    rolled = run(*(v.roll(STRIDE[1:], (3, 4)) for v in (features, noise)), t)
    inner = (slice(None), slice(None), slice(None), slice(36, -36), slice(36, -36))
    for a, b in zip(first, rolled, strict=True):
        assert torch.allclose(a.roll(STRIDE[1:], (3, 4))[inner], b[inner], atol=1e-5)


def test_unshuffle_and_shuffle_are_inverse_and_keep_cells_together() -> None:
    x = torch.randn(2, 3, 4, 6, 8)
    assert torch.equal(shuffle(unshuffle(x)), x)
    assert torch.equal(unshuffle(x)[:, ::4], x[..., ::2, ::2])


def test_features_are_the_sections_around_each_plane() -> None:
    sections = torch.arange(6.0)[None, :, None, None].expand(1, 6, 4, 4)
    index, t = torch.tensor([1, 2, 3]), torch.tensor([0.0, 0.25, 0.5])
    linear, below, above, below2, above2 = slab_features(sections, index, t)[0, :, :, 0, 0]
    assert linear.tolist() == [1, 2.25, 3.5]
    assert (below.tolist(), above.tolist()) == ([1, 2, 3], [2, 3, 4])
    assert (below2.tolist(), above2.tolist()) == ([0, 1, 2], [3, 4, 5])


def test_before_training_the_mean_is_linear_interpolation() -> None:
    features, _, t = inputs()
    assert torch.equal(SlabNet().trunk(features, t, 5.0)[0], features[:, :1])


def test_members_differ_with_the_noise_only() -> None:
    features, noise, t = inputs()
    mean, member = run(features, noise, t)
    again = run(features, noise, t)
    other = run(features, noise + 1, t)
    assert torch.equal(member, again[1])
    assert torch.equal(mean, other[0]) and (member != other[1]).float().mean() > 0.99


def test_cost_is_what_the_docstring_says() -> None:
    with torch.device("meta"):
        net = SlabNet()
        features, noise, t = torch.empty(1, 5, 16, 64, 64), torch.empty(1, 2, 16, 64, 64), torch.empty(16)
    with FlopCounterMode(display=False) as trunk:
        _, fine, coarse = net.trunk(features, t, 6.0)
    with FlopCounterMode(display=False) as member:
        net.spread(net.gates(fine, coarse), noise)
    voxels = features[:, 0].numel()
    assert 1.2e5 < trunk.get_total_flops() / voxels < 1.35e5
    assert member.get_total_flops() / voxels < 1e4


def test_an_ensemble_commutes_with_the_symmetries_of_a_section() -> None:
    net = SlabEnsemble(8, 12, networks=2, turns=8)
    net.load_state_dict(random_state(net))
    features, _, t = inputs()
    features = features[..., :40, :48]
    with torch.inference_mode():
        mean = net.trunk(features, t, 6.0)[0]
        for number in range(8):
            turned = net.trunk(turn(features, number), t, 6.0)[0]
            assert torch.allclose(turn_back(turned, number), mean, atol=1e-5)
        one = SlabNet.trunk(net, features, t, 6.0)[0]
        assert not torch.allclose(turn_back(SlabNet.trunk(net, turn(features, 1), t, 6.0)[0], 1), one, atol=1e-3)


def test_an_ensemble_is_the_average_of_its_networks() -> None:
    net = SlabEnsemble(8, 12, networks=2, turns=1)
    net.load_state_dict(random_state(net))
    features, _, t = inputs()
    with torch.inference_mode():
        both = [SlabNet.trunk(net, features, t, 6.0)[0], net.others[0].trunk(features, t, 6.0)[0]]
        assert not torch.allclose(*both, atol=1e-3)
        assert torch.allclose(net.trunk(features, t, 6.0)[0], sum(both) / 2, atol=1e-6)


def test_planes_of_a_plane_network_know_nothing_of_each_other() -> None:
    net = PlaneNet(8, 12)
    net.load_state_dict(random_state(net))
    features, _, t = inputs()
    some = torch.tensor([9, 2, 5])
    with torch.inference_mode():
        mean = net.trunk(features, t, 6.0)[0]
        assert torch.allclose(net.trunk(features[:, :, some], t[some], 6.0)[0], mean[:, :, some], atol=1e-4)


def random_state(net: torch.nn.Module) -> dict[str, Tensor]:
    """Random everywhere, the residual small."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(p.shape, generator=generator) * (0.3 if "out" in name else 1.2) / max(1, p[0].numel()) ** 0.5
        for name, p in net.state_dict().items()
    }
