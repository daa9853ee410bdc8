"""One affine grey map per volume, between stored greys and the networks' -1..1. Never per tile, never per block.

Convention: ``low`` maps to -1, ``high`` to +1; nothing is clipped on the way in. In negatives, whose thin structures
are bright, ``low`` is above ``high``: networks see dark membranes, and what they say is turned back. The uncertainty is
stored in the same array as the mean, as a linear code: greys = code * step, saturating at the largest code (uint8: 1/8
grey, 31.9 greys).

Where sections differ in brightness and contrast, each has an affine map of its own before that one, which brings it to
the trend of its neighbours (:func:`measure_sections`). It is undone at every plane, between two sections by the
map between theirs, so that the output has the greys of the sections that it lies between.
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
from emdiffuse_vol.geometry.boxes import Box, Triple, reflect

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = NDArray[np.float32]
Floats = TypeVar("Floats", FloatArray, "Tensor")
PERCENTILES = (0.5, 99.5)
SAMPLE, CELLS = (1, 128, 128), (16, 4, 4)  # voxels at a place, and places
EVEN_PATCH, EVEN_SECTIONS, EVEN_REACH = 64, 64, 8  # pixels, sections read at once, and neighbours on either side


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


@dataclass(frozen=True)
class SectionMap:
    """gains, offsets: of each good section: its greys become gain * grey + offset. None of either: nothing is done."""

    gains: tuple[float, ...] = ()
    offsets: tuple[float, ...] = ()

    def even(self, greys: NDArray[Any], first: int) -> NDArray[Any]:
        """greys: [z, y, x] of sections from ``first`` on, mirrored at the ends of the stack."""
        if not self.gains:
            return greys
        gain, offset = self._at(np.arange(first, first + len(greys)))
        even: FloatArray = greys.astype(np.float32) * gain + offset
        return even

    def undo(self, values: Floats, below: NDArray[np.int64], t: FloatArray) -> Floats:
        """values: greys [z, y, x] of planes; below, t: where they lie (see ``geometry.axial``)."""
        if not self.gains:
            return values
        gain, offset = self._between(below, t)
        even: Floats = (values - _like(values, offset)) / _like(values, gain)
        return even

    def undo_spread(self, spread: Floats, below: NDArray[np.int64], t: FloatArray) -> Floats:
        return spread / _like(spread, self._between(below, t)[0]) if self.gains else spread

    def _at(self, sections: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        index = reflect(sections, len(self.gains))
        gain, offset = (np.array(v, np.float32)[index, None, None] for v in (self.gains, self.offsets))
        return gain, offset

    def _between(self, below: NDArray[np.int64], t: FloatArray) -> tuple[FloatArray, FloatArray]:
        part = t[:, None, None]
        low, high = self._at(below), self._at(below + 1)
        return low[0] + part * (high[0] - low[0]), low[1] + part * (high[1] - low[1])


def _like(values: Floats, numbers: FloatArray) -> Any:
    """Numbers as an array of the same kind, on the same device."""
    return numbers if isinstance(values, np.ndarray) else values.new_tensor(numbers)


def measure_sections(shape: Triple, read: Callable[[Box], NDArray[Any]]) -> SectionMap:
    """Mean and deviation of a few patches of every section, brought to the running median of those around it."""
    centres = [[n // 6, n // 2, n - n // 6] for n in shape[1:]]
    corners = [
        [max(0, min(c - EVEN_PATCH // 2, n - EVEN_PATCH)) for c in at] for at, n in zip(centres, shape[1:], strict=True)
    ]
    mean, deviation = np.empty(shape[0]), np.empty(shape[0])
    for first in range(0, shape[0], EVEN_SECTIONS):
        last = min(first + EVEN_SECTIONS, shape[0])
        boxes = (Box((first, y, x), (last, y + EVEN_PATCH, x + EVEN_PATCH)) for y, x in product(*corners))
        parts = [read(box & Box.of(shape)).astype(np.float64).reshape(last - first, -1) for box in boxes]
        greys = np.concatenate(parts, axis=1)
        mean[first:last], deviation[first:last] = greys.mean(1), greys.std(1)
    around = [slice(max(0, k - EVEN_REACH), k + EVEN_REACH + 1) for k in range(shape[0])]
    trend, contrast = (np.array([np.median(values[part]) for part in around]) for values in (mean, deviation))
    gain = np.divide(contrast, deviation, out=np.ones_like(mean), where=(deviation > 0) & (contrast > 0))
    offset = trend - gain * mean
    return SectionMap(tuple(gain.round(6).tolist()), tuple(offset.round(6).tolist()))


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
