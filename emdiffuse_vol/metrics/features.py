"""FSIM: how alike the features of two images are, whatever their greys (Zhang, Zhang, Mou and Zhang 2011, IEEE
Transactions on Image Processing 20:2378, doi:10.1109/TIP.2011.2109730).

Convention: images are [z, y, x], compared plane by plane in XY. Two features: phase congruency, which is high where
the Fourier components of many scales are in phase (Kovesi 1999, as in his ``phasecong2``: 4 scales from a wavelength
of 6 pixels, 4 orientations, noise threshold of 2 standard deviations), and the length of the Scharr gradient. The
score is 1 for equal images. Constants are the authors'; greys are brought to 0..255, and planes of 384 pixels and more
are first averaged down to about 256, as in their program.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi, sqrt
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import convolve

Planes = NDArray[np.float32]

SCALES, ORIENTATIONS = 4, 4
SHORTEST, RATIO = 6, 2  # wavelength in pixels, and how much longer the next one is
SIGMA_RADIUS, SIGMA_ANGLE = 0.55, pi / ORIENTATIONS / 1.2  # widths of the log-Gabor filters
CUTOFF, SHARPNESS = 0.45, 15  # Butterworth filter that leaves out the corners of the frequency plane
NOISE_SIGMAS, NOISE_EXCESS = 2.0, 1.7
T1, T2 = 0.85, 160.0  # of phase congruency and of the gradient, for greys 0..255
SIZE = 256
SCHARR = np.array([[3, 0, -3], [10, 0, -10], [3, 0, -3]], np.float32) / 16


@dataclass(frozen=True)
class Features:
    """Both [z, y, x]. Those of a truth serve all images that are compared with it."""

    congruency: Planes
    gradient: Planes


def fsim(image: NDArray[Any], truth: NDArray[Any], data_range: float = 255.0) -> float:
    """Mean over the planes of [z, y, x]."""
    return float(feature_similarity(features(image, data_range), features(truth, data_range)).mean())


def feature_similarity(a: Features, b: Features) -> NDArray[np.float64]:
    """FSIM of each plane [z] (equations 4 to 7; alpha and beta are 1)."""
    similarity = _alike(a.congruency, b.congruency, T1) * _alike(a.gradient, b.gradient, T2)
    weight = np.maximum(a.congruency, b.congruency)
    total: NDArray[np.float64] = (similarity * weight).sum((1, 2), np.float64) / weight.sum((1, 2), np.float64)
    return total


def features(image: NDArray[Any], data_range: float = 255.0) -> Features:
    greys = _averaged_down(image.astype(np.float32) * np.float32(255 / data_range))
    filters = log_gabor_filters(greys.shape[1:])
    congruency = np.stack([_congruency(plane, filters) for plane in greys])
    # Zero outside the plane, as in the authors' program: the border counts as an edge of both images.
    gradient = np.stack(
        [np.hypot(*(convolve(plane, k, mode="constant") for k in (SCHARR, SCHARR.T))) for plane in greys]
    )
    return Features(congruency, gradient)


def _alike(a: Planes, b: Planes, constant: float) -> Planes:
    """1 where equal, towards 0 where one is much larger."""
    result: Planes = (2 * a * b + constant) / (a**2 + b**2 + constant)
    return result


def _averaged_down(greys: Planes) -> Planes:
    n = max(1, round(min(greys.shape[1:]) / SIZE))
    z, y, x = greys.shape
    cells = greys[:, : y // n * n, : x // n * n].reshape(z, y // n, n, x // n, n)
    result: Planes = cells.mean((2, 4))
    return result


def log_gabor_filters(shape: tuple[int, ...]) -> Planes:
    """[orientation, scale, y, x] transfer functions, zero frequency first. Each passes one side of the frequency plane,
    so that its response is complex: even and odd filter in one."""
    y, x = (np.fft.ifftshift(_frequencies(n)) for n in shape)
    radius, angle = np.hypot(y[:, None], x), np.arctan2(-y[:, None], x)
    radius[0, 0] = 1
    inside = 1 / (1 + (radius / CUTOFF) ** (2 * SHARPNESS))
    wavelengths = SHORTEST * RATIO ** np.arange(SCALES)
    radial = inside * np.exp(-(np.log(radius * wavelengths[:, None, None]) ** 2) / (2 * log(SIGMA_RADIUS) ** 2))
    radial[:, 0, 0] = 0
    directions = np.arange(ORIENTATIONS)[:, None, None] * pi / ORIENTATIONS
    away = np.abs(np.angle(np.exp(1j * (angle - directions))))
    angular = np.exp(-(away**2) / (2 * SIGMA_ANGLE**2))
    return np.asarray(angular[:, None] * radial, np.float32)


def _frequencies(n: int) -> NDArray[np.float64]:
    """Cycles per pixel from -1/2; an odd number of pixels reaches 1/2 too, as in ``phasecong2``."""
    return np.arange(n) / n - 0.5 if n % 2 == 0 else np.linspace(-0.5, 0.5, n)


def _congruency(plane: Planes, filters: Planes) -> Planes:
    """Phase congruency [y, x]: local energy that noise does not explain, over the amplitudes of all filters."""
    spectrum = scipy.fft.fft2(plane)
    energy, amplitudes = np.zeros(plane.shape, np.float32), np.zeros(plane.shape, np.float32)
    for transfer in filters:  # [scale, y, x] of one orientation
        response = scipy.fft.ifft2(spectrum * transfer)
        amplitude = np.abs(response)
        total = response.sum(0)
        direction = total / (np.abs(total) + np.float32(1e-4))
        # |cos| and |sin| of each scale's deviation from the mean phase, times its amplitude.
        turned = response * direction.conj()
        aligned = (turned.real - np.abs(turned.imag)).sum(0)
        energy += np.maximum(aligned - _noise_threshold(amplitude[0], transfer), 0)
        amplitudes += amplitude.sum(0)
    return energy / (amplitudes + np.float32(1e-4))


def _noise_threshold(amplitude: Planes, transfer: Planes) -> float:
    """Energy up to which noise may be the cause. Its power is estimated from the median response of the smallest
    scale, whose square has an exponential distribution; energy of noise has a Rayleigh distribution."""
    power = float(np.median(amplitude**2)) / log(2) / float((transfer[0].astype(np.float64) ** 2).sum())
    kernels = scipy.fft.ifft2(transfer).real * sqrt(amplitude.size)
    products = np.einsum("iyx,jyx->ij", kernels, kernels)
    # 2 sum_i |f_i|^2 + 4 sum_{i<j} f_i f_j: every product twice.
    tau = sqrt(max(0.0, power * float(products.sum())))
    return tau * (sqrt(pi / 2) + NOISE_SIGMAS * sqrt(2 - pi / 2)) / NOISE_EXCESS
