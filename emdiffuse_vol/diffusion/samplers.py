"""Samplers: from noise to an image, as plain functions of a denoiser, a noise source and a schedule.

Convention. ``denoise(y, gamma)`` estimates the noise eps in y = sqrt(gamma) x0 + sqrt(1 - gamma) eps. ``noise(step)``
gives standard normal noise of the shape of y: step 0 is the initial state, step s >= 1 what the s-th evaluation of
the denoiser may add; nothing is drawn anywhere else, and a deterministic sampler asks for step 0 only. The schedule
is walked from its lowest gamma, where y must be practically pure noise, up to gamma = 1, which is returned. Every
estimate of x0 is clipped to [-clip, clip]; ``math.inf`` turns that off.

Letters: g and p are gamma at this step and at the next one ("previous" in the literature, which counts from the
data).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from emdiffuse_vol.diffusion.schedules import Schedule

Denoiser = Callable[[Tensor, float], Tensor]
NoiseSource = Callable[[int], Tensor]


class Sampler(Protocol):
    def __call__(self, denoise: Denoiser, noise: NoiseSource, schedule: Schedule, *, clip: float = 1.0) -> Tensor: ...


def estimate_x0(denoise: Denoiser, y: Tensor, g: float, clip: float) -> Tensor:
    """The image the denoiser sees in y."""
    x0 = (y - math.sqrt(1 - g) * denoise(y, g)) / math.sqrt(g)
    return x0.clamp(-clip, clip)


def ancestral(denoise: Denoiser, noise: NoiseSource, schedule: Schedule, *, clip: float = 1.0) -> Tensor:
    """The published sampler: DDPM with the posterior's variance (Ho et al. 2020, eqs. 6 and 7)."""
    y = noise(0)
    for step, (g, p) in enumerate(schedule.steps(), start=1):
        alpha = g / p
        beta = 1 - alpha
        x0 = estimate_x0(denoise, y, g, clip)
        y = beta * math.sqrt(p) / (1 - g) * x0 + (1 - p) * math.sqrt(alpha) / (1 - g) * y
        if p < 1:
            variance = max(beta * (1 - p) / (1 - g), 1e-20)
            y = y + math.sqrt(variance) * noise(step)
    return y


def ddim(denoise: Denoiser, noise: NoiseSource, schedule: Schedule, *, clip: float = 1.0, eta: float = 0.0) -> Tensor:
    """Song et al. 2021, eqs. 12 and 16: deterministic for eta = 0, :func:`ancestral` for eta = 1.

    eps is that of the clipped x0, so that the two agree with clipping too.
    """
    y = noise(0)
    for step, (g, p) in enumerate(schedule.steps(), start=1):
        x0 = estimate_x0(denoise, y, g, clip)
        eps = (y - math.sqrt(g) * x0) / math.sqrt(1 - g)
        sigma = eta * math.sqrt((1 - p) / (1 - g) * (1 - g / p))
        y = math.sqrt(p) * x0 + math.sqrt(1 - p - sigma**2) * eps
        if sigma > 0:
            y = y + sigma * noise(step)
    return y


def dpm_solver_2m(denoise: Denoiser, noise: NoiseSource, schedule: Schedule, *, clip: float = 1.0) -> Tensor:
    """DPM-Solver++(2M), second order at one evaluation a step (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    The last step, to gamma = 1, is infinitely long in log-SNR; there the newest x0 stands alone.
    """
    y = noise(0)
    older: Tensor | None = None
    last = math.nan
    for g, p in schedule.steps():
        x0 = estimate_x0(denoise, y, g, clip)
        length = _half_log_snr(p) - _half_log_snr(g)
        # x0 extrapolated to the middle of the step, from this evaluation and the one before.
        ahead = x0 if older is None or p == 1 else x0 + (x0 - older) * length / (2 * last)
        y = math.sqrt((1 - p) / (1 - g)) * y - math.sqrt(p) * math.expm1(-length) * ahead
        older, last = x0, length
    return y


def _half_log_snr(g: float) -> float:
    return math.inf if g == 1 else math.log(g / (1 - g)) / 2


SAMPLERS: dict[str, Sampler] = {"ancestral": ancestral, "ddim": ddim, "dpm-solver-2m": dpm_solver_2m}
ALIASES = {"legacy": "ancestral"}  # the published behaviour by name: clipped, on the published schedule
