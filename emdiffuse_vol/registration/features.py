"""One matrix for a whole image: from features that both images show, or from their phases.

Convention: a matrix takes places (y, x) of the fixed image to those of the moving one. Features are SIFT's (Lowe 2004),
matched both ways; RANSAC (Fischler and Bolles 1981) finds the matrix that most of them agree with, within ``tolerance``
pixels, and least squares over those that agree make it exact.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.feature import SIFT, match_descriptors
from skimage.measure import ransac
from skimage.registration import phase_cross_correlation
from skimage.transform import AffineTransform, EuclideanTransform, ProjectiveTransform

from emdiffuse_vol.registration.flow import normalised
from emdiffuse_vol.registration.warps import Floats, Matrix

SMOOTHED = 1.5  # pixels, before features are looked for
DISTINCT = 0.9  # of the distance to the second best match
TRIALS = 2000


class Translation:
    """A shift, as scikit-image's transforms are."""

    params: Matrix

    def estimate(self, src: Floats, dst: Floats) -> bool:
        self.params = np.eye(3)
        self.params[:2, 2] = np.mean(dst - src, axis=0)
        return True

    @classmethod
    def from_estimate(cls, src: Floats, dst: Floats) -> Translation:
        found = cls()
        found.estimate(src, dst)
        return found

    def residuals(self, src: Floats, dst: Floats) -> Floats:
        return np.asarray(np.linalg.norm(src + self.params[:2, 2] - dst, axis=1))


# name -> (transform, how many matches fix it)
MODELS: dict[str, tuple[Any, int]] = {
    "translation": (Translation, 1),
    "rigid": (EuclideanTransform, 2),
    "affine": (AffineTransform, 3),
    "homography": (ProjectiveTransform, 4),
}


@dataclass(frozen=True)
class Fit:
    """matched: features that were matched; agreeing: those that agree with the matrix."""

    matrix: Matrix
    matched: int
    agreeing: int


def fit_features(fixed: Floats, moving: Floats, model: str, tolerance: float) -> Fit:
    """The identity, with which nothing agrees, where not even one matrix can be had."""
    return fit_points(find_features(fixed), find_features(moving), model, tolerance)


@dataclass(frozen=True)
class Features:
    places: Floats  # [n, 2]
    descriptors: Any


def find_features(image: Floats) -> Features:
    smooth = ndimage.gaussian_filter(image.astype(np.float32), SMOOTHED)
    low, high = np.percentile(smooth, (0.1, 99.9))
    detector = SIFT(upsampling=1)
    try:
        detector.detect_and_extract(np.clip((smooth - low) / max(high - low, 1e-6), 0, 1))
    except RuntimeError:  # scikit-image's way to say that there are none
        return Features(np.zeros((0, 2)), np.zeros((0, 128), np.uint8))
    return Features(np.asarray(detector.positions, float), detector.descriptors)


def fit_points(fixed: Features, moving: Features, model: str, tolerance: float) -> Fit:
    transform, least = MODELS[model]
    if min(len(fixed.places), len(moving.places)) <= least:
        return Fit(np.eye(3), 0, 0)
    pairs = match_descriptors(fixed.descriptors, moving.descriptors, cross_check=True, max_ratio=DISTINCT)
    if len(pairs) <= least:
        return Fit(np.eye(3), len(pairs), 0)
    src, dst = fixed.places[pairs[:, 0]], moving.places[pairs[:, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing agrees is said by what is returned
        found, agreeing = ransac(
            (src, dst), transform, min_samples=least, residual_threshold=tolerance, max_trials=TRIALS, rng=0
        )
    if agreeing is None or not np.isfinite(getattr(found, "params", np.nan)).all():
        return Fit(np.eye(3), len(pairs), 0)
    return Fit(np.asarray(found.params, float), len(pairs), int(agreeing.sum()))


def fit_phases(fixed: Floats, moving: Floats) -> Matrix:
    """A shift alone, from the peak of the cross-correlation to a tenth of a pixel. Images of one shape."""
    window = np.outer(*(np.hanning(n + 2)[1:-1] for n in fixed.shape))
    images = [normalised(image) * window for image in (fixed, moving)]
    shift, _, _ = phase_cross_correlation(*images, upsample_factor=10, normalization=None)
    matrix = np.eye(3)
    matrix[:2, 2] = -shift
    return matrix
