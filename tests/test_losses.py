"""Training losses. Laws of few equally likely values are enumerated, so expectations are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emdiffuse_vol.diffusion.losses import (
    difficulty_weighted,
    energy_score,
    epsilon_error,
    fair_crps_pair,
    multiscale_crps,
    squared_error_ratio,
)

G = torch.Generator()
laws = st.lists(st.integers(-9, 9), min_size=4, max_size=4)


def expected_crps(members: list[int], truth: list[int]) -> float:
    """Expectation of the score: independent members and truth, all combinations equally often."""
    values = [torch.tensor(law, dtype=torch.float64) for law in (members, members, truth)]
    return float(fair_crps_pair(*torch.meshgrid(*values, indexing="ij")))


def crps_integral(members: list[int], truth: list[int]) -> float:
    """The definition: the integral of (F(x) - 1[x >= y])^2 over x, averaged over y; F steps at integers only."""
    total = 0.0
    for x in range(-9, 9):
        below = sum(m <= x for m in members) / len(members)
        total += sum((below - (y <= x)) ** 2 for y in truth) / len(truth)
    return total


def signs(cells: int) -> Tensor:
    """[4000, 1, 1, 4, 4] of +1 and -1, drawn once for each of cells x cells parts of a plane."""
    coarse = torch.randint(0, 2, (4000, 1, 1, cells, cells), generator=torch.Generator().manual_seed(cells)) * 2.0 - 1
    return coarse.repeat_interleave(4 // cells, -1).repeat_interleave(4 // cells, -2)


def test_fair_crps_is_its_formula() -> None:
    first, second, truth = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 4.0]), torch.tensor([0.0, 6.0])
    # (1 + 3) / 2 - 2 / 2 = 1 and (2 + 2) / 2 - 0 = 2
    assert fair_crps_pair(first, second, truth) == pytest.approx(1.5)


@given(laws, laws)
def test_two_members_score_as_their_whole_law_would(members: list[int], truth: list[int]) -> None:
    assert expected_crps(members, truth) == pytest.approx(crps_integral(members, truth))


@given(laws, laws)
def test_no_law_of_members_scores_better_than_that_of_the_truth(members: list[int], truth: list[int]) -> None:
    assert expected_crps(members, truth) >= expected_crps(truth, truth) - 1e-12


@given(laws, laws)
def test_another_law_scores_worse(members: list[int], truth: list[int]) -> None:
    if sorted(members) != sorted(truth):
        assert expected_crps(members, truth) > expected_crps(truth, truth) + 1e-6


def test_multiscale_crps_adds_the_score_of_cell_means() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, truth = torch.randn(3, 2, 1, 3, 8, 8, generator=generator)
    means = (x.reshape(2, 1, 3, 2, 4, 2, 4).mean((4, 6)) for x in (a, b, truth))
    torch.testing.assert_close(multiscale_crps(a, b, truth), fair_crps_pair(a, b, truth) + fair_crps_pair(*means))


def test_multiscale_crps_sees_texture_that_single_voxels_hide() -> None:
    truth, fine, other_fine = signs(1), signs(4), signs(4).flip(0)
    coarse, other_coarse = signs(1).roll(1, 0), signs(1).roll(2, 0)
    alike = fair_crps_pair(fine, other_fine, truth) - fair_crps_pair(coarse, other_coarse, truth)
    apart = multiscale_crps(fine, other_fine, truth) - multiscale_crps(coarse, other_coarse, truth)
    assert abs(alike) < 0.05
    assert apart > 0.15


def test_linear_interpolation_scores_one_on_any_scale() -> None:
    truth = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    linear = truth + 1
    for scale in (0.3, 3):
        assert squared_error_ratio(linear * scale, truth * scale, linear * scale, floor=0) == pytest.approx(1)
    assert squared_error_ratio((truth + linear) / 2, truth, linear, floor=0) == pytest.approx(0.25)


def test_error_ratio_is_finite_where_interpolation_is_perfect() -> None:
    truth = torch.zeros(8)
    assert squared_error_ratio(truth + 0.1, truth, truth, floor=1e-4) == pytest.approx(100)


def test_a_weight_leaves_out_what_was_not_measured() -> None:
    mean, truth, plain = (torch.randn(2, 1, 4, 8, 8, generator=G.manual_seed(k)) for k in range(3))
    weight = torch.zeros(1, 1, 1, 8, 1)
    weight[..., ::4, :] = 1
    rows = [x[..., ::4, :] for x in (mean, truth, plain)]
    assert squared_error_ratio(mean, truth, plain, weight) == pytest.approx(float(squared_error_ratio(*rows)), rel=1e-5)
    assert fair_crps_pair(mean, plain, truth, weight) == pytest.approx(
        float(fair_crps_pair(rows[0], rows[2], rows[1])), rel=1e-5
    )
    # One measured row in each cell of 4 x 4: the mean of a cell is that of its row.
    pooled = [torch.nn.functional.avg_pool3d(x, (1, 1, 4)) for x in (rows[0], rows[2], rows[1])]
    both = fair_crps_pair(rows[0], rows[2], rows[1]) + fair_crps_pair(*pooled)
    assert multiscale_crps(mean, plain, truth, weight=weight) == pytest.approx(float(both), rel=1e-4)
    ones = torch.ones_like(truth)
    assert multiscale_crps(mean, plain, truth, weight=ones) == pytest.approx(
        float(multiscale_crps(mean, plain, truth)), rel=1e-5
    )


def test_energy_score_is_its_formula_and_prefers_the_true_distribution() -> None:
    first, second, truth = (torch.randn(5, 3, 4, generator=G.manual_seed(k)) for k in range(3))

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x.reshape(5, -1) ** 2).sum(1).sqrt() / 12**0.5

    expected = (norm(first - truth) + norm(second - truth)) / 2 - norm(first - second) / 2
    assert energy_score(first, second, truth) == pytest.approx(float(expected.mean()), rel=1e-5)
    # The truth varies as a whole; members that vary voxel by voxel have the same marginals and a worse score.
    shape = (4000, 16)
    together = [torch.randn(4000, 1, generator=G.manual_seed(k)).expand(shape) for k in range(3)]
    apart = [torch.randn(shape, generator=G.manual_seed(k)) for k in (7, 8)]
    assert energy_score(*together) < energy_score(*apart, together[2]) - 0.02


def test_difficulty_weighting_is_the_papers_formula_with_its_minimum_at_the_error() -> None:
    estimate, noise = (torch.randn(3, 1, 5, 5, generator=G.manual_seed(k)) for k in range(2))
    phi = torch.rand(3, 1, 5, 5, generator=G.manual_seed(3)) + 0.5
    expected = ((noise - estimate) ** 2 / (2 * phi**2) + phi.log()).mean()
    assert difficulty_weighted(estimate, noise, phi.log()) == pytest.approx(float(expected), rel=1e-5)
    best = (estimate - noise).abs().log()
    for other in (best + 0.1, best - 0.1):
        assert difficulty_weighted(estimate, noise, best) < difficulty_weighted(estimate, noise, other)


def test_epsilon_error_is_the_mean_square() -> None:
    estimate, noise = (torch.randn(3, 1, 5, 5, generator=G.manual_seed(k)) for k in range(2))
    assert epsilon_error(estimate, noise) == pytest.approx(float(((estimate - noise) ** 2).mean()), rel=1e-6)
