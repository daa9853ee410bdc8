"""Windows of neighbouring sections and what their middle is to become, cut from memory.

Convention: a window is [w, y, x], w = 2 * context + 1 sections, mirrored where a stack ends; those of a batch have one
shape. Greys are normalised as they will be where the network is used: by the percentiles of what is restored, not of
its truth. Three kinds of data give the same thing: clean volumes that are degraded on the fly, registered pairs, and
noisy volumes alone, of whose 2x2 cells one pixel is asked to predict another (Huang et al. 2021, arXiv:2101.02824).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import reflect
from emdiffuse_vol.reconstruct.greys import PERCENTILES
from emdiffuse_vol.training.crops import random_orientation
from emdiffuse_vol.training.degrade import COUNTS, SMOOTH, Degradation, Limits, coarsen, expose
from emdiffuse_vol.training.sources import Cubes, Pair
from emdiffuse_vol.training.volumes import FloatArray, TrainingVolume

SIDE = 8  # what the sides of a window are multiples of
HELD_SECTIONS = 24  # of a held-out part, evenly spread, that are scored and calibrated on
PATCHES, PATCH = 64, 16  # places and pixels that a grey range is measured on
# Pixels of a cell in an order whose first two touch; the other orders are turned and mirrored ones.
CELL = np.array(
    [[0, 1, 2, 3], [0, 2, 1, 3], [1, 0, 3, 2], [1, 3, 0, 2], [2, 0, 3, 1], [2, 3, 0, 1], [3, 1, 2, 0], [3, 2, 1, 0]]
)


@dataclass(frozen=True)
class Windows:
    """sections: [n, w, y, x]; target: [n, 1, Y, X]. Of noisy volumes alone: ``others`` [n, 2, y, x], the two pixels of
    each cell that are neither input nor target; ``whole`` [n, w, 2y, 2x], the windows they are from; ``chosen``
    [n, 4, y, x], which pixel of a cell is the input, the target and the others."""

    sections: FloatArray
    target: FloatArray
    others: FloatArray | None = None
    whole: FloatArray | None = None
    chosen: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Shape:
    """Of a batch. patch: pixels of the target; spacing: distances of neighbouring sections in planes of a volume, drawn
    evenly; alone: probability that a section has no neighbours, as a single image, and that it has them on one side."""

    batch: int
    patch: int
    context: int
    factor: int = 1
    spacing: tuple[int, ...] = (1,)
    alone: float = 0.1


Draw = Callable[[np.random.Generator, int], Windows]


def around(volume: FloatArray, middle: int, context: int, spacing: int = 1) -> FloatArray:
    """[z, y, x] -> [w, y, x]."""
    return volume[reflect(middle + spacing * np.arange(-context, context + 1), len(volume))]


def random_window(rng: np.random.Generator, volume: TrainingVolume, shape: Shape, side: int) -> FloatArray:
    """Anywhere where something was measured, in any orientation: [w, side, side]."""
    for _ in range(20):
        turned = random_orientation(rng, volume)
        depth, height, width = turned.greys.shape
        middle, top, left = (int(rng.integers(0, n)) for n in (depth, height - side + 1, width - side + 1))
        y, x = slice(top, top + side), slice(left, left + side)
        if turned.measured[middle, y, x].any():
            break
    return around(turned.greys[:, y, x], middle, shape.context, int(rng.choice(shape.spacing)))


def lonely(rng: np.random.Generator, windows: FloatArray, alone: float) -> FloatArray:
    """Some windows as they are at the ends of a stack, and in a single image: mirrored."""
    context = windows.shape[1] // 2
    for window, chance in zip(windows, rng.random(len(windows)), strict=True):
        if chance < alone:
            window[:] = window[context]
        elif chance < 2 * alone:
            window[:context] = window[:context:-1]
    return windows


def degraded(cubes: Cubes, degradation: Degradation, limits: Limits, shape: Shape) -> Draw:
    """From clean volumes. One dwell time for a batch."""

    def draw(rng: np.random.Generator, step: int) -> Windows:
        volume = cubes.choose(rng, step)
        side = _side(shape.patch, volume.lateral_extent, shape.factor)
        clean = np.stack([random_window(rng, volume, shape, side) for _ in range(shape.batch)])
        counts = degradation.draw(rng)
        smooth = rng.uniform(0.3, 1) * SMOOTH if rng.random() < degradation.correlated else 0.0
        return degrade(rng, clean, volume.greys, counts, degradation.read, limits, shape, smooth)

    return draw


def degrade(
    rng: np.random.Generator,
    clean: FloatArray,
    volume: FloatArray,
    counts: float,
    read: float,
    limits: Limits,
    shape: Shape,
    smooth: float = 0.0,
) -> Windows:
    """clean: [n, w, Y, X] of ``volume``, whose greys after the same degradation are normalised to."""

    def spoilt(greys: FloatArray) -> FloatArray:
        return expose(rng, coarsen(greys, shape.factor), counts, read, limits, smooth)

    depth, height, width = volume.shape
    side = min(PATCH, height, width) // shape.factor * shape.factor
    places = zip(*(rng.integers(0, n, PATCHES) for n in (depth, height - side + 1, width - side + 1)), strict=True)
    low, high = np.percentile(
        spoilt(np.stack([volume[z, y : y + side, x : x + side] for z, y, x in places])), PERCENTILES
    ).astype(np.float32)

    def normalised(greys: FloatArray) -> FloatArray:
        result: FloatArray = (greys - low) * (2 / (high - low)) - 1
        return result

    sections = lonely(rng, normalised(spoilt(clean)), shape.alone)
    return Windows(sections, normalised(clean[:, shape.context, None]))


def paired(pairs: list[Pair], shape: Shape) -> Draw:
    """From registered pairs: one pair for a batch, turned and mirrored."""
    chances = np.array([pair.weight for pair in pairs])

    def draw(rng: np.random.Generator, step: int) -> Windows:
        pair = pairs[int(rng.choice(len(pairs), p=chances / chances.sum()))]
        f = pair.factor
        side = _side(shape.patch, min(pair.condition.shape[1:]) * f, f) // f
        parts = []
        for _ in range(shape.batch):
            plane, top, left = pair.place(rng, side)
            window = around(pair.condition[:, top : top + side, left : left + side], plane, shape.context)
            target = pair.target[plane, None, top * f : (top + side) * f, left * f : (left + side) * f]
            turns, mirror = int(rng.integers(4)), rng.random() < 0.5
            images = [np.rot90(image, turns, (1, 2)) for image in (window, target)]
            parts.append([image[:, ::-1] if mirror else image for image in images])
        sections, targets = (np.stack(images) for images in zip(*parts, strict=True))
        return Windows(lonely(rng, sections, shape.alone), targets)

    return draw


def neighbours(cubes: Cubes, shape: Shape) -> Draw:
    """From noisy volumes alone."""

    def draw(rng: np.random.Generator, step: int) -> Windows:
        volume = cubes.choose(rng, step)
        side = _side(2 * shape.patch, volume.lateral_extent, 2)
        noisy = np.stack([random_window(rng, volume, shape, side) for _ in range(shape.batch)])
        return split_cells(rng, lonely(rng, noisy, shape.alone))

    return draw


def split_cells(rng: np.random.Generator, whole: FloatArray) -> Windows:
    """whole: [n, w, 2y, 2x]. Of each 2x2 cell of the middle section one pixel is input, one that touches it the target;
    of the other sections any pixel is taken, unless they are the middle one again."""
    n, w, height, width = whole.shape
    cells = whole.reshape(n, w, height // 2, 2, width // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, w, -1, 4)
    middle = w // 2
    order = CELL[rng.integers(0, len(CELL), (n, cells.shape[2]))]  # [n, cell, 4]
    pick = rng.integers(0, 4, (n, w, cells.shape[2]))
    same = (whole == whole[:, middle, None]).all(axis=(2, 3))
    pick[same] = np.broadcast_to(order[:, None, :, 0], pick.shape)[same]
    shape = (n, -1, height // 2, width // 2)
    split = np.take_along_axis(cells[:, middle], order, axis=2).transpose(0, 2, 1).reshape(shape)
    sections = np.take_along_axis(cells, pick[..., None], axis=3).reshape(shape)
    chosen = order.transpose(0, 2, 1).reshape(shape)
    return Windows(sections, split[:, 1:2], split[:, 2:], whole, chosen)


def held_degraded(volume: TrainingVolume, read: float, limits: Limits, shape: Shape, counts: float) -> Windows:
    """All of a held-out part, or as many sections as are enough, after one dwell time."""
    rng = np.random.default_rng(0)
    return degrade(
        rng, _all(volume.greys, shape, shape.factor), volume.greys, counts, read, limits, replace(shape, alone=0)
    )


def held_neighbours(volume: TrainingVolume, shape: Shape) -> Windows:
    return split_cells(np.random.default_rng(0), _all(volume.greys, shape, 2))


def held_pair(pair: Pair, shape: Shape) -> Windows:
    condition = _all(pair.condition, shape, 1)
    f, (height, width) = pair.factor, condition.shape[2:]
    target = pair.target[_places(len(pair.target)), None, : height * f, : width * f]
    return Windows(condition, target)


def named_counts(degradation: Degradation) -> dict[str, float]:
    """The named dwell times that are trained for, or the middle one of those that are."""
    least, greatest = degradation.counts
    inside = {name: counts for name, counts in COUNTS.items() if least <= counts <= greatest}
    return inside or {"middle": float(np.sqrt(least * greatest))}


def _places(depth: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, depth - 1, HELD_SECTIONS).round().astype(np.int64))


def _all(greys: FloatArray, shape: Shape, factor: int) -> FloatArray:
    """[n, w, Y, X], cut to sides that a network takes."""
    height, width = (size // (SIDE * factor) * SIDE * factor for size in greys.shape[1:])
    return np.stack([around(greys, z, shape.context)[:, :height, :width] for z in _places(len(greys))])


def _side(patch: int, extent: int, factor: int) -> int:
    return min(patch, extent) // (SIDE * factor) * SIDE * factor
