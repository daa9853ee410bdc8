"""Spectra along z, against volumes whose spectrum is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from emdiffuse_vol.metrics.interpolation import linear
from emdiffuse_vol.metrics.spectra import (
    Shells,
    axial_correlation,
    axial_power,
    relative_power,
    resolution,
    ring_correlation,
)

SHAPE = (80, 72, 75)


def noise(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filtered(image: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """gain: of each z frequency, in the order of numpy."""
    return np.fft.ifft(np.fft.fft(image, axis=0) * gain[:, None, None], axis=0).real.astype(np.float32)


def test_a_volume_correlates_with_itself_and_not_with_another() -> None:
    same = axial_correlation(3 * noise(0) + 100, noise(0))
    np.testing.assert_allclose(same.value, 1, atol=1e-5)
    assert resolution(same) == 2
    other = axial_correlation(noise(1), noise(0))
    assert np.abs(other.value[8:]).max() < 0.2
    assert abs(other.value[8:].mean()) < 0.03


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_correlation_of_noisy_volumes_is_known(ratio: float) -> None:
    """A truth plus noise of another volume: power S and N = S / ratio give sqrt(S / (S + N))."""
    truth = noise(0)
    found = axial_correlation(truth + noise(1) / np.sqrt(ratio), truth).value[10:]
    assert found.mean() == pytest.approx(np.sqrt(ratio / (ratio + 1)), abs=0.03)


@pytest.mark.parametrize("cutoff", [0.15, 0.3])
def test_resolution_is_where_detail_ends_along_z_only(cutoff: float) -> None:
    frequency = np.abs(np.fft.fftfreq(SHAPE[0]))
    low = (frequency < cutoff).astype(float)
    truth = noise(0)
    image = filtered(truth, low) + filtered(noise(1), 1 - low)
    # In a narrow cone the z frequency is the frequency, up to the width of a shell.
    assert 1 / resolution(axial_correlation(image, truth, cone=15)) == pytest.approx(cutoff, abs=2 / 72)
    turned = np.moveaxis(image, 0, 1), np.moveaxis(truth, 0, 1)
    assert resolution(axial_correlation(*turned, cone=15)) == 2


def test_resolution_is_interpolated() -> None:
    frequency = np.array([0.1, 0.2, 0.3, 0.4])
    assert resolution(Shells(frequency, np.array([1, 0.8, 0.2, 0.0])), 0.5) == pytest.approx(1 / 0.25)
    assert resolution(Shells(frequency, np.array([0.1, 0.8, 0.2, 0.0])), 0.5) == np.inf


def test_linear_interpolation_correlates_as_aliasing_says() -> None:
    """Sections every R planes fold the spectrum: at f the correlation is sqrt(P(f) / sum_m P(f + m / R)), whatever is
    made of them linearly."""
    factor, n = 4, 97
    frequency = np.abs(np.fft.fftfreq(n))
    power = np.exp(-((frequency / 0.12) ** 2))
    truth = filtered(noise(3, (n, 96, 96)), np.sqrt(power))
    found = axial_correlation(linear(truth[::factor], factor), truth, cone=12)
    f = found.frequency

    def spectrum(x: np.ndarray) -> np.ndarray:
        return np.exp(-(((np.abs(x + 0.5) % 1 - 0.5) / 0.12) ** 2))

    expected = np.sqrt(spectrum(f) / sum(spectrum(f + m / factor) for m in range(factor)))
    middle = (f > 0.05) & (f < 0.3)
    np.testing.assert_allclose(found.value[middle], expected[middle], atol=0.12)


def test_isotropic_volumes_have_as_much_power_along_all_axes() -> None:
    found = axial_power(noise(0))
    assert found.value[6:].mean() == pytest.approx(1, abs=0.03)
    assert relative_power(found, found) == 1


def test_blur_along_z_takes_away_the_power_it_must() -> None:
    truth = noise(0)
    blurred = axial_power(gaussian_filter1d(truth, 1.0, axis=0, mode="wrap"), cone=12)
    found = blurred.value / axial_power(truth, cone=12).value
    f = blurred.frequency
    # Power of a Gaussian filter of standard deviation 1 at z frequency f cos(a), averaged over a cone of 12 degrees;
    # x and y, in theirs, are blurred by less than 5 % of that.
    c = np.cos(np.radians(12))
    expected = -4 * np.pi**2 * f**2 * (1 + c + c**2) / 3
    np.testing.assert_allclose(np.log(found[4:14]), expected[4:14], rtol=0.08)


def test_relative_power_is_a_geometric_mean_between_two_frequencies() -> None:
    f = np.arange(1, 9) / 16 - 1 / 32
    to = Shells(f, np.full(8, 2.0))
    of = Shells(f, np.array([99.0, 1, 4, 16, 99, 99, 99, 99]))
    assert relative_power(of, to) == pytest.approx(2)
    assert relative_power(of, to, lowest=1 / 8, highest=3 / 16) == pytest.approx(2)
    assert relative_power(of, to, lowest=3 / 16) == pytest.approx(8)


@pytest.mark.parametrize("shape", [(2, 64, 48), (1, 33, 64)])
def test_rings_are_those_of_whole_spectra(shape: tuple[int, int, int]) -> None:
    """Against numpy's full transform, ring by ring, plane by plane."""
    truth = noise(0, shape)
    image = truth + noise(1, shape)
    height, width = shape[1:]
    window = np.sin(np.pi * (np.arange(height) + 0.5) / height)[:, None] ** 2
    window = window * np.sin(np.pi * (np.arange(width) + 0.5) / width) ** 2
    a, b = (np.fft.fft2((v - v.mean((1, 2), keepdims=True)) * window) for v in (image, truth))
    square = [np.fft.fftfreq(n).astype(np.float32) ** 2 for n in (height, width)]
    rings = (np.sqrt(square[0][:, None] + square[1]) / (2 / min(height, width))).astype(int)
    found = ring_correlation(image, truth)
    for k in range(1, len(found.value) - 1):
        ring = rings == k
        common = (a * b.conj()).real[:, ring].sum()
        power = (np.abs(a[:, ring]) ** 2).sum() * (np.abs(b[:, ring]) ** 2).sum()
        assert found.value[k] == pytest.approx(common / np.sqrt(power), abs=1e-4)
    np.testing.assert_allclose(ring_correlation(7 * truth - 3, truth).value, 1, atol=1e-5)
