"""Fourier spectra of volumes along z: how fine the detail is that two have in common, and how much of it there is.

Convention: images are whole volumes [z, y, x] on cubic voxels, measured planes included; frequencies are in cycles
per voxel, 1/2 at the most. "Along z" means within ``CONE`` degrees of the z axis, "along x" likewise. The mean is
taken off and a Hann window put on first, without which the faces of the volume would make a cross of high frequencies
on the very axes. Frequencies are put in shells of the same width, two of the coarsest steps that the volume has. Rings
are the same within planes, each by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, cos, exp, nan, pi, radians
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray

CONE = 30.0
THRESHOLD = 1 / 7
Curve = NDArray[np.float64]


@dataclass(frozen=True)
class Shells:
    """Some quantity by frequency. frequency: the middle of each shell."""

    frequency: Curve
    value: Curve


def axial_correlation(image: NDArray[Any], truth: NDArray[Any], cone: float = CONE) -> Shells:
    """Fourier shell correlation along z (Harauz and van Heel 1986; in a cone: Diebolder et al. 2015,
    doi:10.1016/j.ultramic.2015.07.005): 1 where all detail is that of the truth, 0 where none is."""
    a, b = _spectrum(image), _spectrum(truth)
    shells = _cone(image.shape, 0, cone)
    common = shells.sum((a * b.conj()).real)
    power = shells.sum(_power(a)) * shells.sum(_power(b))
    return Shells(shells.frequency, common / np.sqrt(np.maximum(power, 1e-300)))


def ring_correlation(image: NDArray[Any], truth: NDArray[Any]) -> Shells:
    """Fourier ring correlation (Saxton and Baumeister 1982) of the planes of [z, y, x], which may be any, summed over
    them."""
    a, b = _spectrum(image, (1, 2)), _spectrum(truth, (1, 2))
    rings = _cone((1, *image.shape[1:]), 2, 180.0)  # all directions

    def sums(values: NDArray[Any]) -> Curve:
        return rings.sum(values.sum(0, dtype=np.float64))

    power = sums(_power(a)) * sums(_power(b))
    return Shells(rings.frequency, sums((a * b.conj()).real) / np.sqrt(np.maximum(power, 1e-300)))


def resolution(correlation: Shells, threshold: float = THRESHOLD) -> float:
    """Finest detail that is in common, in voxels: 1 / the frequency where the correlation first falls below the
    threshold (1/7: Rosenthal and Henderson 2003, doi:10.1016/j.jmb.2003.07.013, for a comparison with a perfect truth).
    2, the least that voxels hold, where it never does; infinite where it is below from the beginning."""
    frequency, value = correlation.frequency, correlation.value
    below = np.flatnonzero(value < threshold)
    if not below.size:
        return 2.0
    k = int(below[0])
    if k == 0:
        return float("inf")
    part = (value[k - 1] - threshold) / (value[k - 1] - value[k])
    return float(1 / (frequency[k - 1] + part * (frequency[k] - frequency[k - 1])))


def axial_power(image: NDArray[Any], cone: float = CONE) -> Shells:
    """Power spectrum along z over that along y and x. In isotropic tissue, isotropically imaged, it is 1 throughout."""
    power = _power(_spectrum(image))
    along = []
    for axis in range(3):
        shells = _cone(image.shape, axis, cone)
        along.append(shells.mean(power))
    z, y, x = along
    return Shells(shells.frequency, z / ((y + x) / 2))


def relative_power(of: Shells, to: Shells, lowest: float = 0.0, highest: float = 0.25) -> float:
    """Geometric mean of one curve over another between two frequencies (1/4: half of what voxels hold), without the
    lowest shell, which the window fills: below 1, detail along z is missing; above 1, there is too much. NaN where no
    shell lies between them."""
    used = (of.frequency > lowest) & (of.frequency <= highest)
    used[0] = False
    if not used.any():
        return nan
    return exp(float(np.log(of.value[used] / to.value[used]).mean()))


def _spectrum(image: NDArray[Any], axes: tuple[int, ...] = (0, 1, 2)) -> NDArray[np.complex64]:
    """Half of the Fourier transform, that with x frequencies from 0."""
    greys = image.astype(np.float32)
    greys -= greys.mean(axes, keepdims=True)
    for axis in axes:
        n = greys.shape[axis]
        window = np.sin(pi * (np.arange(n) + 0.5) / n) ** 2
        greys *= window.astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
    spectrum: NDArray[np.complex64] = scipy.fft.rfftn(greys, axes=axes, overwrite_x=True)
    return spectrum


def _power(spectrum: NDArray[np.complex64]) -> NDArray[np.float32]:
    return spectrum.real**2 + spectrum.imag**2


@dataclass(frozen=True)
class _Cone:
    """chosen: flat indices of its frequencies in the half spectrum; shell: the shell of each; weight: 2 where the half
    spectrum leaves out a mirror image."""

    frequency: Curve
    chosen: NDArray[np.int64]
    shell: NDArray[np.int64]
    weight: NDArray[np.float32]

    def sum(self, values: NDArray[Any]) -> Curve:
        weighted = values.ravel()[self.chosen] * self.weight
        total: Curve = np.bincount(self.shell, weighted, minlength=len(self.frequency)).astype(np.float64)
        return total

    def mean(self, values: NDArray[Any]) -> Curve:
        return self.sum(values) / np.bincount(self.shell, self.weight, minlength=len(self.frequency))


def _cone(shape: tuple[int, ...], axis: int, cone: float) -> _Cone:
    z, y, x = shape
    parts = [np.fft.fftfreq(z)[:, None, None], np.fft.fftfreq(y)[:, None], np.fft.rfftfreq(x)]
    parts = [part.astype(np.float32) for part in parts]
    radius = np.sqrt(sum(part**2 for part in parts))
    width = 2 / min(n for n in shape if n > 1)
    count = ceil(0.5 / width)
    # The shell around frequency 0 has no direction and is left out.
    inside = (np.abs(parts[axis]) >= np.float32(cos(radians(cone))) * radius) & (radius <= 0.5) & (radius >= width / 2)
    chosen = np.flatnonzero(inside)
    shell = np.minimum((radius.ravel()[chosen] / width).astype(np.int64), count - 1)
    column = chosen % (x // 2 + 1)
    mirrored = (column > 0) & ((column < x // 2) | (x % 2 == 1))
    frequency: Curve = (np.arange(count, dtype=np.float64) + 0.5) * width
    return _Cone(frequency, chosen, shell, np.where(mirrored, 2, 1).astype(np.float32))
