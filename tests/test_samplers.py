"""Schedules and samplers, on data whose every answer is known.

Data ~ N(MEAN, SPREAD^2) at every element: the best denoiser, the law of y at every gamma and the flow from one gamma to
another are all in closed form, and a sampler is an affine map of its noise, so its statistics need no random numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emdiffuse_vol.diffusion.samplers import SAMPLERS, Sampler, ancestral, ddim, dpm_solver_2m
from emdiffuse_vol.diffusion.schedules import (
    TRAINED_RANGE,
    Schedule,
    linear,
    published_misfit,
    published_test,
    published_train,
    uniform_log_snr,
)

MEAN, SPREAD = 0.3, 0.5
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def variance(g: float) -> float:
    """Of y at gamma = g."""
    return g * SPREAD**2 + 1 - g


def best_eps(y: Tensor, g: float) -> Tensor:
    """E[eps | y]."""
    return math.sqrt(1 - g) / variance(g) * (y - math.sqrt(g) * MEAN)


def flowed(y: Tensor, g: float, p: float) -> Tensor:
    """The probability-flow ODE from gamma g to p: quantiles are kept."""
    return math.sqrt(p) * MEAN + math.sqrt(variance(p) / variance(g)) * (y - math.sqrt(g) * MEAN)


def curious_eps(y: Tensor, g: float) -> Tensor:
    """No law at all: any function will do where samplers are compared with each other or with their formulas."""
    return y + torch.sin(3 * y + g) / 2


def drawn(step: int) -> Tensor:
    return torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def law(sampler: Sampler, schedule: Schedule) -> tuple[float, float]:
    """Exact mean and variance of the output: element k is driven by the noise of step k alone, the last by none."""
    one_hot = torch.eye(len(schedule) + 1, dtype=torch.float64)
    out = sampler(best_eps, lambda step: one_hot[step], schedule, clip=math.inf)
    return float(out[-1]), float((out[:-1] - out[-1]).square().sum())


# Schedules


@pytest.mark.parametrize(
    ("schedule", "last"),
    [
        (published_train(), 4.39e-5),
        (published_test(1000), 6.6e-21),
        (published_test(500), 8.1e-11),
        (published_test(), 9.2e-5),
    ],
)
def test_published_schedules_end_where_published(schedule: Schedule, last: float) -> None:
    assert schedule.gammas[-1] == pytest.approx(last, rel=0.01)


def test_trained_range_is_that_of_the_training_schedule() -> None:
    gammas = published_train().gammas
    assert (gammas[-1], gammas[0]) == pytest.approx(TRAINED_RANGE, rel=1e-3)
    assert gammas[-1] <= TRAINED_RANGE[0]
    assert TRAINED_RANGE[1] <= gammas[0]


@pytest.mark.parametrize(("steps", "share"), [(1000, 0.53), (500, 0.34), (200, 0)])
def test_long_published_schedules_leave_the_trained_range(steps: int, share: float) -> None:
    untrained = [gamma < TRAINED_RANGE[0] for gamma in published_test(steps).gammas]
    assert sum(untrained) / steps == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("steps", "said"), [(20, "still hold 6[0-9]%"), (150, None), (200, None), (250, None), (1000, "53% of the steps")]
)
def test_steps_that_do_not_fit_the_published_schedule_are_told(steps: int, said: str | None) -> None:
    found = published_misfit(steps)
    assert found is None if said is None else found is not None and re.search(said, found)


def test_linear_is_linear_in_beta() -> None:
    schedule = linear(5, 0.1, 0.5)
    assert schedule.betas == pytest.approx((0.1, 0.2, 0.3, 0.4, 0.5))
    assert schedule.alphas == pytest.approx((0.9, 0.8, 0.7, 0.6, 0.5))
    assert schedule.gammas == pytest.approx((0.9, 0.72, 0.504, 0.3024, 0.1512))


@given(st.integers(1, 60))
def test_few_step_schedules_start_at_the_lowest_trained_gamma_and_stay_in_range(steps: int) -> None:
    gammas = uniform_log_snr(steps).gammas
    assert len(gammas) == steps
    assert gammas[-1] == TRAINED_RANGE[0]
    assert gammas[0] <= TRAINED_RANGE[1]


def test_few_step_schedules_are_even_in_log_snr() -> None:
    log_snr = [math.log(gamma / (1 - gamma)) for gamma in uniform_log_snr(9).gammas]
    gaps = [a - b for a, b in pairwise(log_snr)]
    assert gaps == pytest.approx([gaps[0]] * 8)


@pytest.mark.parametrize("gammas", [(), (1.0, 0.5), (0.5, 0.0), (0.5, 0.5), (0.2, 0.8)])
def test_gammas_that_do_not_fall_are_refused(gammas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="fall strictly"):
        Schedule(gammas)


# Samplers


def test_an_ancestral_step_is_the_published_formula() -> None:
    g, p = 0.3, 0.8
    alpha, beta = g / p, 1 - g / p
    y = drawn(0)
    x0 = (math.sqrt(1 / g) * y - math.sqrt(1 / g - 1) * curious_eps(y, g)).clamp(-1, 1)
    assert (x0.abs() == 1).any()
    assert (x0.abs() < 1).any()
    posterior_mean = beta * math.sqrt(p) / (1 - g) * x0 + (1 - p) * math.sqrt(alpha) / (1 - g) * y
    y = posterior_mean + math.sqrt(beta * (1 - p) / (1 - g)) * drawn(1)
    x0 = (math.sqrt(1 / p) * y - math.sqrt(1 / p - 1) * curious_eps(y, p)).clamp(-1, 1)
    torch.testing.assert_close(ancestral(curious_eps, drawn, Schedule((p, g))), x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip", [1.0, math.inf])
@pytest.mark.parametrize("schedule", [published_test(20), uniform_log_snr(7)])
def test_ddim_with_all_its_noise_is_ancestral(schedule: Schedule, clip: float) -> None:
    expected = ancestral(curious_eps, drawn, schedule, clip=clip)
    found = ddim(curious_eps, drawn, schedule, clip=clip, eta=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("sampler", "steps"), [(ancestral, range(7)), (ddim, [0]), (dpm_solver_2m, [0])])
def test_noise_is_asked_for_by_step(sampler: Sampler, steps: list[int]) -> None:
    asked: list[int] = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return drawn(step)

    sampler(curious_eps, noise, uniform_log_snr(7))
    assert asked == list(steps)


@every_sampler
def test_a_sampler_evaluates_each_gamma_of_its_schedule_once(sampler: Sampler) -> None:
    seen: list[float] = []

    def denoise(y: Tensor, g: float) -> Tensor:
        seen.append(g)
        return curious_eps(y, g)

    schedule = uniform_log_snr(6)
    sampler(denoise, drawn, schedule)
    assert tuple(reversed(seen)) == schedule.gammas


@every_sampler
def test_equal_noise_gives_equal_samples_and_leaves_the_global_generator_alone(sampler: Sampler) -> None:
    before = torch.random.get_rng_state()
    first, second = (sampler(curious_eps, drawn, uniform_log_snr(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.random.get_rng_state())


@every_sampler
def test_clipping_bounds_the_output_and_can_be_turned_off(sampler: Sampler) -> None:
    schedule = uniform_log_snr(5)
    assert sampler(lambda y, g: -9 * y, drawn, schedule).abs().max() == 1
    assert sampler(lambda y, g: -9 * y, drawn, schedule, clip=math.inf).abs().max() > 1


@pytest.mark.parametrize("schedule", [published_test(), uniform_log_snr(20)])
def test_ancestral_samples_have_the_law_of_the_published_chain(schedule: Schedule) -> None:
    mean, spread = 0.0, 1.0
    for t in reversed(range(len(schedule))):
        g, beta, p = schedule.gammas[t], schedule.betas[t], (1.0, *schedule.gammas)[t]
        # The best x0 is a y + b.
        a = SPREAD**2 * math.sqrt(g) / variance(g)
        b = MEAN * (1 - g) / variance(g)
        c1, c2 = beta * math.sqrt(p) / (1 - g), (1 - p) * math.sqrt(1 - beta) / (1 - g)
        mean = (c1 * a + c2) * mean + c1 * b
        spread = (c1 * a + c2) ** 2 * spread + beta * (1 - p) / (1 - g)
    assert law(ancestral, schedule) == pytest.approx((mean, spread), rel=1e-9)


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        (ancestral, uniform_log_snr(2000)),
        (ancestral, published_train()),
        (ddim, uniform_log_snr(1000)),
        (ddim, published_train()),
        (dpm_solver_2m, uniform_log_snr(60)),
    ],
)
def test_samples_have_the_mean_and_variance_of_the_data(sampler: Sampler, schedule: Schedule) -> None:
    assert law(sampler, schedule) == pytest.approx((MEAN, SPREAD**2), rel=0.01)


def uneven(steps: int) -> Schedule:
    """As :func:`uniform_log_snr`, but every third level left out: steps of h, 2h, h, 2h..."""
    return Schedule(tuple(g for t, g in enumerate(uniform_log_snr(3 * steps // 2).gammas) if t % 3 != 1))


@pytest.mark.parametrize("few_steps", [uniform_log_snr, uneven])
@pytest.mark.parametrize(("sampler", "ratio"), [(ddim, 2.0), (dpm_solver_2m, 4.0)])
def test_error_falls_with_the_order_of_the_solver(
    sampler: Sampler, ratio: float, few_steps: Callable[[int], Schedule]
) -> None:
    start = torch.linspace(-3, 3, 7, dtype=torch.float64)
    lowest, highest = TRAINED_RANGE
    y = flowed(start, lowest, highest)
    exact = (y - math.sqrt(1 - highest) * best_eps(y, highest)) / math.sqrt(highest)

    def error(steps: int) -> float:
        found = sampler(best_eps, lambda _: start, few_steps(steps), clip=math.inf)
        return float((found - exact).abs().max())

    assert error(160) / error(320) == pytest.approx(ratio, rel=0.1)


def test_second_order_beats_first_at_few_steps() -> None:
    def distance(sampler: Sampler) -> float:
        return abs(law(sampler, uniform_log_snr(8))[1] - SPREAD**2)

    assert distance(dpm_solver_2m) < distance(ddim) / 2
