"""Clean sections to what a faster microscope would have recorded: fewer electrons a pixel, larger pixels.

Convention: greys are normalised, -1 the black and +1 the white of a volume (its 0.5th and 99.5th percentile). A pixel's
dwell time is given as the electrons that are counted in a white one, ``counts``; a black one counts ``DARK`` of them.
Counts are Poisson distributed, the amplifier adds normal noise of ``read`` of white, and the result is in the greys of
the clean section, cut off where its data type ends. Dwell times in steps of four have names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.reconstruct.greys import Codes, GreyMap
from emdiffuse_vol.training.volumes import FloatArray

DARK = 0.25
SMOOTH = 0.8
READ = 0.02
COUNTS = {"mild": 200.0, "moderate": 50.0, "strong": 12.5}
Limits = tuple[float, float]


@dataclass(frozen=True)
class Degradation:
    """Of training crops, anew whenever they are used.

    counts: [least, greatest] dwell time in electrons counted in a white pixel; that of a batch is drawn evenly in its
    logarithm. read: noise of the amplifier, of white. correlated: probability that noise is smoothed by up to
    ``SMOOTH`` pixels, as by an alignment that interpolated.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    counts: tuple[float, float] = (8.0, 400.0)
    read: float = READ
    correlated: float = 0.0

    def check(self) -> None:
        least, greatest = self.counts
        if not 0 < least <= greatest:
            raise ConfigError(f"degradation.counts is {list(self.counts)}; expected [least, greatest], both above 0")
        if self.read < 0 or not 0 <= self.correlated <= 1:
            raise ConfigError("degradation.read must not be below 0, and degradation.correlated be from 0 to 1")

    def draw(self, rng: np.random.Generator) -> float:
        """A dwell time."""
        return float(np.exp(rng.uniform(*np.log(self.counts))))


def expose(
    rng: np.random.Generator, clean: FloatArray, counts: float, read: float, limits: Limits, smooth: float = 0.0
) -> FloatArray:
    """clean: [..., y, x] -> the same after so short a dwell time. limits: least and greatest grey of the data type.
    smooth: standard deviation in pixels of what noise is smoothed by; its variance stays."""
    signal = DARK + (1 - DARK) / 2 * (clean + 1)
    noisy = rng.poisson(counts * np.maximum(signal, 0)).astype(np.float32) / np.float32(counts)
    noisy += np.float32(read) * rng.standard_normal(clean.shape, np.float32)
    if smooth > 0:
        noise = noisy - signal
        level = noise.std()
        noise = gaussian_filter(noise, (0,) * (clean.ndim - 2) + (smooth, smooth))
        noisy = signal + noise * (level / noise.std())
    exposed: FloatArray = np.clip((noisy - DARK) * (2 / (1 - DARK)) - 1, *limits).astype(np.float32)
    return exposed


def grey_limits(greys: GreyMap, dtype: str) -> Limits:
    """Where a data type ends, in normalised greys."""
    info = np.finfo(dtype) if dtype == "float32" else np.iinfo(dtype)
    low, high = greys.normalise(np.array([info.min, info.max]))
    return float(low), float(high)


def record(
    rng: np.random.Generator, clean: NDArray[Any], greys: GreyMap, counts: float, factor: int = 1, read: float = READ
) -> NDArray[Any]:
    """clean: stored greys [..., y, x] -> what the faster microscope would have stored, in the same data type."""
    dtype = str(clean.dtype)
    coarse = coarsen(greys.normalise(clean), factor)
    return Codes(dtype).mean(greys.restore(expose(rng, coarse, counts, read, grey_limits(greys, dtype))))


def coarsen(clean: FloatArray, factor: int) -> FloatArray:
    """[..., y, x], multiples of the factor -> the means of ``factor`` x ``factor`` pixels: what a beam as wide as a
    coarse pixel records, and no aliasing of finer detail."""
    *rest, y, x = clean.shape
    cells: FloatArray = clean.reshape(*rest, y // factor, factor, x // factor, factor).mean(axis=(-3, -1))
    return cells
