"""Training crops: hide planes along one axis of a volume, learn to give them back.

Convention: a crop is cut after choosing which axis plays z, which axes are mirrored, and the factor R: sections are
every R-th plane, targets are all planes from the first to the last section.
Randomness is a ``numpy.random.Generator`` given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import reflect
from emdiffuse_vol.models.unet import STRIDE
from emdiffuse_vol.training.volumes import FloatArray, TrainingVolume

# STRIDE, 8, is that of the published network, and a multiple of SlabNet's.
TRIES = 20  # places looked at for something that was measured


@dataclass(frozen=True)
class Crop:
    """sections: [s, y, x], the first and the last two being context; truth: [z, y, x]; index, t: [z], see
    ``models.slab.slab_features``; hidden: [z], True where the plane is to be predicted; known: broadcastable to the
    truth, 1 where it was measured; gap: lateral pixels."""

    sections: FloatArray
    truth: FloatArray
    index: NDArray[np.int64]
    t: FloatArray
    hidden: NDArray[np.bool_]
    known: FloatArray
    gap: float


def random_orientation(rng: np.random.Generator, volume: TrainingVolume) -> TrainingVolume:
    """One of the 48 symmetries of the cube, of those that put an allowed axis first, as a view."""
    first = int(rng.choice(volume.axes))
    axes = (first, *rng.permutation([axis for axis in range(3) if axis != first]))
    flips = tuple(slice(None, None, -1) if rng.random() < 0.5 else slice(None) for _ in range(3))
    return TrainingVolume(volume.greys.transpose(axes)[flips], volume.known.transpose(axes)[flips], (0,))


def cut_crop(
    volume: TrainingVolume, factor: int, start: int, gaps: int, y: slice, x: slice, thickness: int = 1
) -> Crop:
    """Sections every ``factor`` planes from plane ``start``, ``gaps`` gaps of them, context mirrored at the ends.

    thickness: planes that a section is the mean of, an odd number, as a thick section or a deep beam averages them.
    """
    greys = volume.greys
    planes = np.arange(gaps * factor + 1)
    section = start + factor * np.arange(-1, gaps + 3)
    # Mirroring is about measured sections, as it will be when a real stack ends.
    count = (greys.shape[0] - 1 - start % factor) // factor + 1
    section = start % factor + factor * reflect(section // factor, count)
    deep = section[:, None] + np.arange(thickness) - thickness // 2
    part = (slice(start, start + gaps * factor + 1), y, x)
    return Crop(
        sections=greys[reflect(deep, greys.shape[0]), y, x].mean(axis=1),
        truth=np.ascontiguousarray(greys[part]),
        index=planes // factor + 1,
        t=(planes % factor / factor).astype(np.float32),
        hidden=planes % factor != 0,
        known=np.ascontiguousarray(volume.measured[part]),
        gap=float(factor),
    )


def random_crop(
    rng: np.random.Generator, volume: TrainingVolume, factor: int, planes: int, patch: int, thick: float = 0
) -> Crop:
    """A crop of about ``planes`` planes and ``patch`` x ``patch`` pixels, less where the volume is smaller, anywhere
    where something was measured, in any orientation. thick: probability that sections are thicker than a plane."""
    side = min(patch, volume.lateral_extent) // STRIDE * STRIDE
    for _ in range(TRIES):
        turned = random_orientation(rng, replace(volume, axes=volume.axes_for(factor)))
        depth, height, width = turned.greys.shape
        gaps = max(1, min(max(2, round(planes / factor)), (depth - 1) // factor))
        start = int(rng.integers(0, depth - gaps * factor))
        top, left = (int(rng.integers(0, size - side + 1)) for size in (height, width))
        thickness = 1 + 2 * int(rng.integers(1, 1 + max(1, factor // 2))) if rng.random() < thick else 1
        y, x = slice(top, top + side), slice(left, left + side)
        crop = cut_crop(turned, factor, start, gaps, y, x, thickness)
        if crop.known[crop.hidden].any():
            break
    return crop
