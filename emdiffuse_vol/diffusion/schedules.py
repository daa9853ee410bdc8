"""Noise schedules: which levels of noise a sampler, or a training run, passes through.

Convention. ``gamma`` in (0, 1) is the share of signal power: y = sqrt(gamma) x0 + sqrt(1 - gamma) eps. ``gammas``
falls from the least noise, t = 0, to the most, t = T - 1; a sampler walks it backwards and ends at gamma = 1, which
is no level of the schedule. alpha_t = gamma_t / gamma_{t-1} with gamma_{-1} = 1, and beta_t = 1 - alpha_t.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Gammas the published networks have seen in training; outside they extrapolate.
TRAINED_RANGE = (4.39e-5, 0.999999)


@dataclass(frozen=True)
class Schedule:
    """``gammas``: strictly falling, within (0, 1)."""

    gammas: tuple[float, ...]

    def __post_init__(self) -> None:
        levels = (1.0, *self.gammas, 0.0)
        if len(levels) < 3 or not all(high > low for high, low in pairwise(levels)):
            raise ValueError(f"gammas must fall strictly within (0, 1), found {self.gammas[:3]}...{self.gammas[-3:]}")

    def __len__(self) -> int:
        return len(self.gammas)

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(low / high for high, low in pairwise((1.0, *self.gammas)))

    @property
    def betas(self) -> tuple[float, ...]:
        return tuple(1 - alpha for alpha in self.alphas)

    def steps(self) -> Iterator[tuple[float, float]]:
        """(gamma now, gamma next) of each sampling step, from the most noise to none; the last goes to gamma = 1."""
        return pairwise((*reversed(self.gammas), 1.0))


def linear(steps: int, first: float, last: float) -> Schedule:
    """Betas evenly spaced from ``first`` to ``last``, both included."""
    betas = np.linspace(first, last, steps)
    return Schedule(tuple(np.cumprod(1 - betas).tolist()))


def published_train() -> Schedule:
    """What the released networks were trained on."""
    return linear(2000, 1e-6, 0.01)


def published_test(steps: int = 200) -> Schedule:
    """The published sampling schedule.

    200 steps end at gamma = 9.2e-5 and match the training. More steps spend themselves below the trained range (53 % of
    1000), and with fewer than about 150 the first state is not yet pure noise, as every sampler takes it to be.
    """
    return linear(steps, 1e-4, 0.09)


def published_misfit(steps: int) -> str | None:
    """What is wrong with so many steps of :func:`published_test`, or None: see there."""
    gammas = np.array(published_test(steps).gammas)
    if (left := float(gammas[-1]) ** 0.5) > 0.035:
        return (
            f"the first state is taken to be noise but would still hold {left:.0%} of the image; use 150 to 250 steps"
        )
    if (wasted := float((gammas < TRAINED_RANGE[0]).mean())) > 0.1:
        return f"{wasted:.0%} of the steps are at noise levels that no network was trained on; use 150 to 250 steps"
    return None


def uniform_log_snr(steps: int, trained: tuple[float, float] = TRAINED_RANGE) -> Schedule:
    """``steps`` levels evenly spaced in log(gamma / (1 - gamma)) over ``trained``: for samplers of few steps.

    The first step is at the lowest gamma, where y is practically standard normal, for any number of steps.
    """
    lowest, highest = (float(np.log(gamma / (1 - gamma))) for gamma in trained)
    inner = 1 / (1 + np.exp(-np.linspace(lowest, highest, steps)[1:-1]))
    # The ends are taken as given: rounding must not push them out of the range.
    gammas = (trained[0], *inner.tolist(), trained[1])[:steps]
    return Schedule(gammas[::-1])
