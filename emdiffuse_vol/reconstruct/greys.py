"""One affine grey map per volume, between stored greys and the networks' -1..1. Never per tile, never per block.

Convention: ``low`` maps to -1, ``high`` to +1; nothing is clipped on the way in. In negatives, whose thin structures
are bright, ``low`` is above ``high``: networks see dark membranes, and what they say is turned back. The uncertainty is
stored in the same array as the mean, as a linear code: greys = code * step, saturating at the largest code (uint8: 1/8
grey, 31.9 greys).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box, Triple

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = NDArray[np.float32]
Floats = TypeVar("Floats", FloatArray, "Tensor")
PERCENTILES = (0.5, 99.5)
SAMPLE, CELLS = (1, 128, 128), (16, 4, 4)  # voxels at a place, and places


@dataclass(frozen=True)
class GreyMap:
    low: float
    high: float

    def normalise(self, greys: NDArray[Any]) -> FloatArray:
        scale = np.float32(2 / (self.high - self.low))
        return (greys.astype(np.float32) - np.float32(self.low)) * scale - np.float32(1)

    def restore(self, values: Floats) -> Floats:
        return (values + 1.0) * ((self.high - self.low) / 2) + self.low

    def restore_spread(self, spread: Floats) -> Floats:
        return spread * (abs(self.high - self.low) / 2)


def dtype_greys(dtype: str) -> GreyMap:
    """The full range of the dtype, as the published networks expect it (uint8: 0..255)."""
    if dtype == "float32":
        raise InputError("the published networks map the full range of an integer dtype; float32 input has none")
    info = np.iinfo(dtype)
    return GreyMap(float(info.min), float(info.max))


def measure_greys(shape: Triple, read: Callable[[Box], NDArray[Any]]) -> tuple[GreyMap, str]:
    """Percentiles of a sparse, evenly spread, fixed sample, and a digest of it that tells one volume from another.

    Empty (constant) places do not count. Raises InputError for NaN or infinity, and for a volume without contrast.
    """
    samples, digest = [], sha256()
    for index in product(*(range(c) for c in CELLS)):
        start = tuple(
            max(0, (n - s) * i // max(c - 1, 1)) for n, s, i, c in zip(shape, SAMPLE, index, CELLS, strict=True)
        )
        stop = tuple(min(n, a + s) for n, a, s in zip(shape, start, SAMPLE, strict=True))
        box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
        greys = read(box)
        check_finite(greys, box)
        digest.update(np.ascontiguousarray(greys).tobytes())
        if greys.min() < greys.max():
            samples.append(greys.ravel())
    if samples:
        low, high = (float(p) for p in np.percentile(np.concatenate(samples), PERCENTILES))
        if low < high:
            return GreyMap(low, high), digest.hexdigest()[:16]
    raise InputError("the volume has no contrast: 99 % of its sampled greys are one value; check the input")


def check_finite(greys: NDArray[Any], box: Box) -> None:
    if greys.dtype.kind == "f" and not np.isfinite(greys).all():
        bad = np.argwhere(~np.isfinite(greys))[0]
        z, y, x = (int(i + o) for i, o in zip(bad, box.start, strict=True))
        raise InputError(
            f"the input holds NaN or infinity, first at voxel z={z}, y={y}, x={x}; replace such voxels first"
        )


@dataclass(frozen=True)
class Codes:
    """How mean and uncertainty are stored in one array of the input's dtype: float32 arrays or tensors to the same of
    that dtype."""

    dtype: str

    @property
    def step(self) -> float:
        """Greys per code of the uncertainty channel."""
        return 1.0 if self.dtype == "float32" else 1 / 8

    @property
    def largest(self) -> float | None:
        """Largest uncertainty, in greys, that can be stored; None where there is no limit."""
        return None if self.dtype == "float32" else float(np.iinfo(self.dtype).max) * self.step

    @overload
    def mean(self, greys: FloatArray) -> NDArray[Any]: ...

    @overload
    def mean(self, greys: Tensor) -> Tensor: ...

    def mean(self, greys: Any) -> Any:
        return self._store(greys)

    @overload
    def uncertainty(self, greys: FloatArray) -> NDArray[Any]: ...

    @overload
    def uncertainty(self, greys: Tensor) -> Tensor: ...

    def uncertainty(self, greys: Any) -> Any:
        return self._store(greys / self.step)

    def _store(self, values: Any) -> Any:
        if self.dtype == "float32":
            return values
        info = np.iinfo(self.dtype)
        whole = values.round().clip(info.min, info.max)
        if isinstance(whole, np.ndarray):
            return whole.astype(self.dtype)
        import torch

        return whole.to(getattr(torch, self.dtype))
