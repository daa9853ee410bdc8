"""Whether a stated uncertainty is honest: coverage, spread against skill, and the fair CRPS of an ensemble.

Convention: mean, uncertainty and truth have one shape and are in the same greys; the uncertainty is one standard
deviation of the truth about the mean. Members are stacked first: [k, ...].
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, pi, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z90 = 1.645  # of a normal distribution: the central interval that holds 90 %


@dataclass(frozen=True)
class SpreadScore:
    """Sums over voxels; scores of parts add to the score of the whole."""

    voxels: int = 0
    inside: int = 0
    variance: float = 0.0
    squared_error: float = 0.0

    @property
    def coverage(self) -> float:
        """Share of voxels whose truth lies in mean +- z * uncertainty."""
        return self.inside / self.voxels if self.voxels else nan

    @property
    def spread_skill(self) -> float:
        """Root mean square of the uncertainty over that of the error: 1 is honest, below 1 overconfident."""
        return sqrt(self.variance / self.squared_error) if self.squared_error else nan

    def __add__(self, other: SpreadScore) -> SpreadScore:
        return SpreadScore(
            self.voxels + other.voxels,
            self.inside + other.inside,
            self.variance + other.variance,
            self.squared_error + other.squared_error,
        )


def score_spread(mean: NDArray[Any], uncertainty: NDArray[Any], truth: NDArray[Any], z: float = Z90) -> SpreadScore:
    error = np.abs(mean.astype(np.float64) - truth.astype(np.float64))
    spread = uncertainty.astype(np.float64)
    inside = int(np.count_nonzero(error <= z * spread))
    return SpreadScore(error.size, inside, float((spread**2).sum()), float((error**2).sum()))


def coverage(mean: NDArray[Any], uncertainty: NDArray[Any], truth: NDArray[Any], z: float = Z90) -> float:
    return score_spread(mean, uncertainty, truth, z).coverage


def coverage_curve(
    mean: NDArray[Any], uncertainty: NDArray[Any], truth: NDArray[Any], levels: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Coverage of the central intervals that are to hold ``levels`` (0 to 1) of the truth: mean +- z * uncertainty with
    the quantile z of a normal distribution, 1.645 for 0.9."""
    z = np.array([NormalDist().inv_cdf((1 + level) / 2) for level in levels])
    error = np.abs(mean.astype(np.float32) - truth.astype(np.float32))
    # The smallest z whose interval holds the truth; where both are 0, every one does.
    needed = np.divide(error, uncertainty, out=np.where(error > 0, np.float32(np.inf), 0), where=uncertainty > 0)
    order = np.searchsorted(np.sort(needed, axis=None), z, side="right")
    share: NDArray[np.float64] = order / needed.size
    return share


def normal_crps(mean: NDArray[Any], uncertainty: NDArray[Any], truth: NDArray[Any]) -> float:
    """Mean over voxels of the continuous ranked probability score, in greys, where the truth is said to be normally
    distributed: sigma (w (2 Phi(w) - 1) + 2 phi(w) - 1 / sqrt(pi)), w = (truth - mean) / sigma (Gneiting et al. 2005,
    equation 5, doi:10.1175/MWR2904.1). Where sigma is 0 it is the absolute error."""
    from scipy.special import erf

    error = np.abs(truth.astype(np.float64) - mean.astype(np.float64))
    sigma = uncertainty.astype(np.float64)
    w = np.divide(error, sigma, out=np.zeros_like(error), where=sigma > 0)
    spread = error * erf(w / sqrt(2)) + sigma * (sqrt(2 / pi) * np.exp(-(w**2) / 2) - 1 / sqrt(pi))
    return float(np.where(sigma > 0, spread, error).mean())


def spread_skill(members: NDArray[Any], truth: NDArray[Any]) -> float:
    """Of an ensemble [k, ...], with the factor sqrt(1 + 1/k) of Fortin et al. 2014 (doi:10.1175/JHM-D-14-0008.1):
    where members and truth are drawn from one distribution, the ratio is 1 for every k."""
    k, values = len(members), members.astype(np.float64)
    score = score_spread(values.mean(0), values.std(0, ddof=1), truth)
    return sqrt(1 + 1 / k) * score.spread_skill


def fair_crps(members: NDArray[Any], truth: NDArray[Any]) -> float:
    """Mean over voxels of |x - y| over members minus half of |x - x'| over pairs of different members [k >= 2, ...].

    Unlike the CRPS of the empirical distribution its expectation does not depend on k (Ferro 2014,
    doi:10.1002/qj.2270).
    """
    k, values = len(members), members.astype(np.float64)
    error = np.abs(values - truth.astype(np.float64)).mean()
    # Sorted, x_i is larger than i others and smaller than k - 1 - i: the sum of |x - x'| over pairs in one pass.
    rank = 2 * np.arange(k) - (k - 1)
    pairs = np.tensordot(rank, np.sort(values, axis=0), axes=1).mean()
    return float(error - pairs / (k * (k - 1)))
