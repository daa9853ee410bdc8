"""Metrics, against brute force, scikit-image, closed forms and the table of linear interpolation on real data."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from emdiffuse_vol.metrics.image import HALO, ImageScore, psnr, score_image, ssim
from emdiffuse_vol.metrics.interpolation import cubic, linear
from emdiffuse_vol.metrics.seams import face_differences, seam
from emdiffuse_vol.metrics.spread import SpreadScore, coverage, coverage_curve, fair_crps, score_spread, spread_skill


def pair(shape: tuple[int, ...], seed: int = 0, noise: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    truth = random.integers(0, 256, shape, dtype=np.uint8)
    return (truth + random.normal(0, noise, shape)).astype(np.float32), truth


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    image, truth = pair((3, 40, 33))
    expected = np.mean([structural_similarity(a, b, data_range=255) for a, b in zip(image, truth, strict=True)])
    assert ssim(image, truth) == pytest.approx(expected, abs=1e-6)
    assert psnr(image, truth) == pytest.approx(
        peak_signal_noise_ratio(truth.astype(float), image.astype(float), data_range=255), abs=1e-6
    )


@settings(max_examples=25, deadline=None)
@given(cut_y=st.integers(1, 29), cut_x=st.integers(1, 24), cut_z=st.integers(1, 2))
def test_scores_of_blocks_add_up_to_the_score_of_the_whole(cut_y: int, cut_x: int, cut_z: int) -> None:
    image, truth = pair((3, 30, 25))
    whole = score_image(image, truth, 255)
    total = ImageScore(255)
    for z in (slice(0, cut_z), slice(cut_z, 3)):
        for y in ((0, cut_y), (cut_y, 30)):
            for x in ((0, cut_x), (cut_x, 25)):
                read = [slice(max(0, a - HALO), b + HALO) for a, b in (y, x)]
                core = tuple(slice(a - r.start, b - r.start) for (a, b), r in zip((y, x), read, strict=True))
                total += score_image(image[z, read[0], read[1]], truth[z, read[0], read[1]], 255, core)
    assert (total.voxels, total.pixels) == (whole.voxels, whole.pixels)
    assert total.psnr == pytest.approx(whole.psnr, abs=1e-9)
    assert total.ssim == pytest.approx(whole.ssim, abs=1e-6)


def test_scores_at_the_limits() -> None:
    image, truth = pair((2, 6, 20))
    assert np.isnan(ssim(image, truth))
    assert psnr(truth, truth) == np.inf
    assert np.isnan(ImageScore(255).psnr)


# Every interval of the 250^3 cube, missing planes only. SCIENCE.md, section 1; the last digit is rounded.
TABLE = {4: (28.11, 0.760), 5: (26.95, 0.716), 6: (25.94, 0.674), 8: (24.33, 0.598), 10: (23.14, 0.535)}


@pytest.mark.parametrize("factor", list(TABLE))
def test_linear_interpolation_scores_as_published_on_fib25(data: Path, factor: int) -> None:
    from PIL import Image

    files = sorted((data / "fib25_val" / "grayscale_maps").glob("*.png"))
    truth = np.stack([np.asarray(Image.open(file)) for file in files])
    planes = linear(truth[::factor], factor)
    missing = np.arange(len(planes)) % factor != 0
    score = score_image(planes[missing], truth[: len(planes)][missing], 255)
    assert (round(score.psnr, 2), round(score.ssim, 3)) == TABLE[factor]


@pytest.mark.parametrize("factor", [2, 5, Fraction(5, 2), Fraction(450, 43)])
@pytest.mark.parametrize("method", [linear, cubic])
def test_interpolation_keeps_sections_and_straight_lines(method: object, factor: Fraction | int) -> None:
    z, y, x = np.meshgrid(np.arange(6), np.arange(4), np.arange(5), indexing="ij")
    ramp = 10.0 * z + y - x
    planes = method(ramp, factor)  # type: ignore[operator]
    position = np.arange(len(planes)) / float(factor)
    # Catmull-Rom bends where the ends are mirrored.
    inner = (position >= 1) & (position <= 4) if method is cubic else np.full(len(planes), True)
    np.testing.assert_allclose(planes[inner], (10 * position[:, None, None] + (y - x)[0])[inner], atol=1e-4)
    sections = np.random.default_rng(0).integers(0, 256, (6, 4, 5))
    planes = method(sections, factor)  # type: ignore[operator]
    for i in range(len(planes)):
        if (i / Fraction(factor)).denominator == 1:
            np.testing.assert_array_equal(planes[i], sections[int(i / Fraction(factor))])


def test_linear_is_that_of_scipy() -> None:
    sections = np.random.default_rng(1).normal(size=(5, 3, 4))
    planes = linear(sections, Fraction(7, 3))
    where = np.meshgrid(np.arange(len(planes)) * 3 / 7, np.arange(3), np.arange(4), indexing="ij")
    np.testing.assert_allclose(planes, map_coordinates(sections, where, order=1, mode="nearest"), atol=1e-6)


def test_honest_spread_covers_and_matches_the_error() -> None:
    random = np.random.default_rng(2)
    spread = random.uniform(1, 9, (20, 100, 100))
    mean = random.normal(size=spread.shape)
    truth = mean + spread * random.normal(size=spread.shape)
    assert coverage(mean, spread, truth) == pytest.approx(0.9, abs=0.003)
    assert coverage(mean, spread, truth, z=1) == pytest.approx(0.6827, abs=0.005)
    parts = [score_spread(mean[i : i + 7], spread[i : i + 7], truth[i : i + 7]) for i in range(0, 20, 7)]
    total = sum(parts, SpreadScore())
    assert total.spread_skill == pytest.approx(1, abs=0.01)
    assert total.coverage == coverage(mean, spread, truth)


@pytest.mark.parametrize("k", [2, 4, 10])
def test_ensemble_of_the_truths_distribution_is_perfect(k: int) -> None:
    random = np.random.default_rng(3)
    members, truth = random.normal(size=(k, 200_000)), random.normal(size=200_000)
    assert spread_skill(members, truth) == pytest.approx(1, abs=0.01)
    # The CRPS of a standard normal forecast of a standard normal truth is 1 / sqrt(pi), whatever the number of members.
    assert fair_crps(members, truth) == pytest.approx(np.pi**-0.5, abs=0.01)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(2, 6), seed=st.integers(0, 99))
def test_fair_crps_is_its_definition(k: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    members, truth = random.normal(size=(k, 3, 4)), random.normal(size=(3, 4))
    pairs = np.mean([np.abs(a - b) for a, b in permutations(members, 2)])
    assert fair_crps(members, truth) == pytest.approx(np.abs(members - truth).mean() - pairs / 2)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_seam_is_found_and_none_is_not(axis: int) -> None:
    image = np.random.default_rng(4).normal(100, 10, (64, 64, 64))
    faces = [15, 31, 47]
    clean = seam(face_differences(image, axis), faces)
    assert abs(clean.deviation) < 4
    step = (np.arange(64) // 16 % 2 * 8.0).reshape([-1 if i == axis else 1 for i in range(3)])
    broken = seam(face_differences(image + step, axis), faces)
    assert broken.deviation > 10
    assert broken.ratio > 1.1


def test_standard_error_of_the_seam_ratio_is_its_scatter() -> None:
    random = np.random.default_rng(5)
    found = [seam(face_differences(random.normal(size=(40, 12, 12)), 0), [9, 19, 29]) for _ in range(300)]
    assert np.std([s.ratio for s in found]) == pytest.approx(np.mean([s.error for s in found]), rel=0.25)


def test_differences_of_pieces_are_those_of_the_whole() -> None:
    image = np.random.default_rng(6).integers(0, 255, (30, 5, 7), dtype=np.uint8)
    pieces = [face_differences(image[a : a + 11], 0) for a in range(0, 30, 10)]
    np.testing.assert_array_equal(np.concatenate(pieces), face_differences(image, 0))


def test_coverage_curve_is_the_coverage_at_each_level() -> None:
    random = np.random.default_rng(7)
    spread = random.uniform(0, 9, (6, 40, 50)).astype(np.float32)
    spread[0] = 0  # certain: right in one half, wrong in the other
    mean = random.normal(100, 5, spread.shape)
    truth = mean + spread * random.normal(size=spread.shape)
    truth[0, :20] += 1
    levels = np.array([0.1, 0.5, 0.9, 0.99])
    found = coverage_curve(mean, spread, truth, levels)
    z = [0.125661, 0.674490, 1.644854, 2.575829]  # a table of the normal distribution
    np.testing.assert_allclose(found, [coverage(mean, spread, truth, z=q) for q in z], atol=2e-4)
    np.testing.assert_allclose(found, 0.5 / 6 + levels * 5 / 6, atol=0.012)
