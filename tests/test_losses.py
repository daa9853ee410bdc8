"""Training losses. Laws of few equally likely values are enumerated, so expectations are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emdiffuse_vol.diffusion.losses import fair_crps_pair, multiscale_crps, squared_error_ratio

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
