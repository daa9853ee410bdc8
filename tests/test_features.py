"""FSIM, against another implementation and against what it must be by its definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from emdiffuse_vol.metrics.features import Features, feature_similarity, features, fsim, log_gabor_filters


def pair(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    truth = gaussian_filter(random.normal(size=(2, height, width)), (0, 3, 3))
    truth = np.clip(128 + truth / truth.std() * 40, 0, 255)
    image = np.clip(gaussian_filter(truth, (0, 1.5, 1.5)) + random.normal(0, 8, truth.shape), 0, 255)
    return image.astype(np.float32), truth.astype(np.float32)


# piq.fsim(x, y, data_range=255, chromatic=False, reduction="none") of piq 0.8.0 for the pairs above, planes as a batch.
# Both compute in float32; the orientations are summed in another order. 512 and 400 x 600 are averaged down by 2.
PIQ = {
    (64, 96, 0): (0.9314084, 0.9303968),
    (63, 95, 1): (0.9366552, 0.93676454),
    (250, 250, 2): (0.9299101, 0.9309591),
    (512, 512, 3): (0.9728919, 0.9714556),
    (400, 600, 4): (0.9723724, 0.9717891),
}


@pytest.mark.parametrize("case", list(PIQ))
def test_fsim_is_that_of_piq(case: tuple[int, int, int]) -> None:
    image, truth = pair(*case)
    found = feature_similarity(features(image), features(truth))
    np.testing.assert_allclose(found, PIQ[case], atol=5e-6)
    assert fsim(image, truth) == pytest.approx(np.mean(PIQ[case]), abs=5e-6)


def test_fsim_at_its_limits_and_in_other_greys() -> None:
    image, truth = pair(64, 64, 5)
    assert fsim(truth, truth) == pytest.approx(1, abs=1e-6)
    assert fsim(image, truth) == pytest.approx(fsim(truth, image), abs=1e-6)
    assert fsim(image * 257, truth * 257, data_range=65535) == pytest.approx(fsim(image, truth), abs=1e-5)
    blurred = [fsim(gaussian_filter(truth, (0, s, s)), truth) for s in (0.5, 1, 2, 4)]
    assert sorted(blurred, reverse=True) == blurred


def test_similarity_is_weighted_by_the_stronger_congruency() -> None:
    a = Features(np.array([[[0.5, 0.1]]], np.float32), np.array([[[10, 0]]], np.float32))
    b = Features(np.array([[[0.2, 0.4]]], np.float32), np.array([[[30, 5]]], np.float32))
    first = (2 * 0.5 * 0.2 + 0.85) / (0.29 + 0.85) * (600 + 160) / (1000 + 160)
    second = (2 * 0.1 * 0.4 + 0.85) / (0.17 + 0.85) * 160 / (25 + 160)
    assert feature_similarity(a, b)[0] == pytest.approx((0.5 * first + 0.4 * second) / 0.9, rel=1e-6)


def test_congruency_is_at_steps_whatever_their_height() -> None:
    image = np.full((2, 128, 128), 60, np.float32)
    image[0, :, 64:] = 90
    image[1, :, 64:] = 240
    low, high = features(image).congruency
    np.testing.assert_allclose(low[:, 40:88], high[:, 40:88], atol=0.02)
    assert low[64, 63:65].min() > 0.8  # the pixels on either side of the step
    assert low[64, 20:44].max() < 0.5


def test_filters_pass_their_wavelength_and_no_mean() -> None:
    filters = log_gabor_filters((192, 192))
    assert filters.shape == (4, 4, 192, 192)
    assert not filters[:, :, 0, 0].any()
    for scale, wavelength in enumerate((6, 12, 24, 48)):
        along_x = filters[0, scale, 0, :96]
        assert int(along_x.argmax()) == 192 // wavelength
        assert along_x.max() == pytest.approx(1, abs=1e-3)
        assert filters[0, scale, 0, 96:].max() < 0.01  # one side of the plane only
