"""Training crops from an isotropic volume: hide planes along one axis, learn to give them back.

Convention: volumes are [z, y, x] float32, normalised; a crop is cut after choosing which axis plays z, which axes are
mirrored, and the factor R: sections are every R-th plane, targets are all planes from the first to the last section.
Randomness is a ``numpy.random.Generator`` given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import reflect

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Crop:
    """sections: [s, y, x], the first and the last two being context; truth: [z, y, x]; index, t: [z], see
    ``models.slab.slab_features``; hidden: [z], True where the plane was not measured; gap: lateral pixels."""

    sections: FloatArray
    truth: FloatArray
    index: NDArray[np.int64]
    t: FloatArray
    hidden: NDArray[np.bool_]
    gap: float


def random_orientation(rng: np.random.Generator, volume: FloatArray) -> FloatArray:
    """One of the 48 symmetries of the cube, as a view."""
    axes = rng.permutation(3)
    flips = tuple(slice(None, None, -1) if rng.random() < 0.5 else slice(None) for _ in range(3))
    return volume.transpose(axes)[flips]


def cut_crop(volume: FloatArray, factor: int, start: int, gaps: int, y: slice, x: slice) -> Crop:
    """Sections every ``factor`` planes from plane ``start``, ``gaps`` gaps of them, context mirrored at the ends."""
    planes = np.arange(gaps * factor + 1)
    section = start + factor * np.arange(-1, gaps + 3)
    # Mirroring is about measured sections, as it will be when a real stack ends.
    count = (volume.shape[0] - 1 - start % factor) // factor + 1
    section = start % factor + factor * reflect(section // factor, count)
    return Crop(
        sections=np.ascontiguousarray(volume[section, y, x]),
        truth=np.ascontiguousarray(volume[start : start + gaps * factor + 1, y, x]),
        index=planes // factor + 1,
        t=(planes % factor / factor).astype(np.float32),
        hidden=planes % factor != 0,
        gap=float(factor),
    )


def random_crop(rng: np.random.Generator, volume: FloatArray, factor: int, planes: int, patch: int) -> Crop:
    """A crop of about ``planes`` planes and ``patch`` x ``patch`` pixels, anywhere, in any orientation, with greys
    stretched and shifted a little, because other microscopes' normalised greys will differ."""
    volume = random_orientation(rng, volume)
    gaps = max(2, round(planes / factor))
    depth, height, width = volume.shape
    start = int(rng.integers(0, depth - gaps * factor))
    top, left = (int(rng.integers(0, size - patch + 1)) for size in (height, width))
    crop = cut_crop(volume, factor, start, gaps, slice(top, top + patch), slice(left, left + patch))
    gain, offset = np.float32(rng.uniform(0.8, 1.25)), np.float32(rng.uniform(-0.15, 0.15))
    return Crop(crop.sections * gain + offset, crop.truth * gain + offset, crop.index, crop.t, crop.hidden, crop.gap)
