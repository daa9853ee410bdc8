"""A moving image brought onto a fixed one: a matrix for the whole, then dense flow in tiles, and how far to trust it.

Convention: both images have pixels of one size (see :class:`Binned` for those that have not). Images larger than
OVERVIEW are first registered as overviews, means of k x k pixels; flow is then refined at full resolution, tile by
tile, so memory is bounded by a few tiles and by the cells of one image (1/64 of its pixels).

*Confidence* of a cell, from 0 to 1: correlation of both images around it once they are registered (smoothed, so that
noise of a fast scan counts little; negative ones count 0), times exp(-e^2 / 2), where e is the *inverse inconsistency*:
how many pixels off one comes back after going to the moving image and returning by the flow of the swapped pair. It is
0 where any pixel of the cell lies outside the moving image.

What is measured decides whether a pair is refused: see ``LIMITS``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.registration.features import MODELS, Fit, fit_features, fit_phases
from emdiffuse_vol.registration.flow import Flow, choose_flow, normalised
from emdiffuse_vol.registration.warps import (
    STRIDE,
    Floats,
    Image,
    Warp,
    cell_means,
    cell_shape,
    places_of,
    sample,
)

OVERVIEW = 1536  # pixels along the longest side of what is looked at as a whole
TILE, HALO = 512, 64  # pixels of flow computed at a time, and around them
WORKERS = min(4, os.cpu_count() or 1)  # tiles at a time
BAND = 1 << 22  # pixels of full resolution read at a time for an overview
SEEN, AROUND = 2.0, 8.0  # pixels: smoothing before images are correlated, and how far around a place
PASSES = 2  # of flow at full resolution: the second sees what windows of the first have averaged away
EVEN = 0.6  # cells: smoothing of the flow from cell to cell
BENT = 10.0  # pixels that features may be off the matrix where flow follows, and where none does
STIFF = 3.0

Window = tuple[slice, slice]

# measure -> (least value, what it is)
LIMITS = {
    "agreeing": (12, "features that agree with one transform"),
    "overlap": (0.25, "share of the fixed image inside the moving one"),
    "confident": (0.5, "share of the overlap with a confidence of at least 0.5"),
}
CONFIDENT = 0.5


@dataclass(frozen=True)
class Settings:
    """transform: one of ``features.MODELS``; by: features or correlation (of translations alone); flow: one of
    ``flow.FLOWS``, or none; weights: a file, of RAFT."""

    transform: str = "affine"
    by: str = "features"
    flow: str = "ilk"
    weights: str | None = None

    def check(self) -> None:
        """Raises ConfigError."""
        if self.transform not in MODELS:
            raise ConfigError(f"transform {self.transform!r} is unknown; choose one of {', '.join(MODELS)}")
        if self.by not in ("features", "correlation"):
            raise ConfigError(f"by is {self.by!r}; choose features or correlation")
        if self.by == "correlation" and self.transform != "translation":
            raise ConfigError(f"correlation finds a translation, not {self.transform}; choose --transform translation")

    def load_flow(self) -> Flow | None:
        """Raises ConfigError, WeightsError."""
        return None if self.flow == "none" else choose_flow(self.flow, self.weights)


@dataclass(frozen=True)
class Registration:
    """confidence [cells_y, cells_x], 0 to 1. measures: those of LIMITS, and ``correlation`` (median, of places inside),
    ``inconsistency`` (median, px), ``matched`` (features)."""

    warp: Warp
    confidence: Floats
    measures: dict[str, float]

    @property
    def failures(self) -> list[str]:
        """What speaks against the pair, with the numbers; empty where it is accepted."""
        return [
            f"{name} {self.measures[name]:.3g}, at least {least:g} needed ({meaning})"
            for name, (least, meaning) in LIMITS.items()
            if name in self.measures and not self.measures[name] >= least
        ]


def register(fixed: Image, moving: Image, settings: Settings, flow: Flow | None) -> Registration:
    """flow: of ``settings.load_flow()``, made once for many pairs. A pair that cannot be registered comes back with
    what failed in ``failures``. Raises ConfigError."""
    step = overview_step(fixed, moving)
    small = overview(fixed, step), overview(moving, step)
    fit = _fit(*small, settings, (BENT if flow else STIFF) / step)
    counted: dict[str, float] = {"matched": fit.matched, "agreeing": fit.agreeing} if settings.by == "features" else {}
    if counted and fit.agreeing < LIMITS["agreeing"][0]:
        nothing = np.zeros(cell_shape(fixed.shape), np.float32)
        return Registration(Warp.rigid(np.eye(3), fixed.shape), nothing, counted)
    warp = Warp.rigid(fit.matrix, small[0].shape)
    if step > 1:
        if flow:
            warp, _ = refine(*small, warp, flow)
        warp = warp.enlarged(step, fixed.shape)
    inconsistency = np.zeros(cell_shape(fixed.shape), np.float32)
    for _ in range(PASSES if flow else 1):
        warp, (correlation, apart, covered) = refine(fixed, moving, warp, flow)
        # Once bent, even what does not belong together comes back to where it was: the first pass tells.
        inconsistency = np.maximum(inconsistency, apart)
    confidence = np.clip(correlation, 0, 1) * np.exp(-(inconsistency**2) / 2) * (covered == 1)
    there = covered == 1
    measures = {
        "overlap": float(covered.mean()),
        "confident": float((confidence[there] >= CONFIDENT).mean()) if there.any() else 0.0,
        "correlation": float(np.median(correlation[there])) if there.any() else nan,
        "inconsistency": float(np.median(inconsistency[there])) if there.any() else nan,
    }
    return Registration(warp, np.asarray(confidence, np.float32), measures | counted)


def _fit(fixed: Floats, moving: Floats, settings: Settings, tolerance: float) -> Fit:
    if settings.by == "features":
        return fit_features(fixed, moving, settings.transform, max(2.0, tolerance))
    shape = tuple(max(a, b) for a, b in zip(fixed.shape, moving.shape, strict=True))
    margins = ([(0, n - m) for n, m in zip(shape, image.shape, strict=True)] for image in (fixed, moving))
    padded = (np.pad(image, margin, "reflect") for image, margin in zip((fixed, moving), margins, strict=True))
    return Fit(fit_phases(*padded), 0, 0)


def refine(fixed: Image, moving: Image, warp: Warp, flow: Flow | None) -> tuple[Warp, Floats]:
    """-> the warp with flow in it (without, where that is None), and for every cell [3, cells_y, cells_x] correlation,
    inverse inconsistency in px, and the share of its pixels that are inside the moving image."""
    bend = np.zeros((2, *cell_shape(fixed.shape)), np.float32)
    judged = np.zeros((3, *cell_shape(fixed.shape)), np.float32)

    def work(tile: tuple[Window, Window]) -> None:
        own, (rows, columns) = tile
        places = places_of((rows.stop - rows.start, columns.stop - columns.start), (rows.start, columns.start))
        found = _refine_tile(np.asarray(fixed[rows, columns], np.float32), moving, warp, places, flow)
        cells = tuple(slice(o.start // STRIDE, -(-o.stop // STRIDE)) for o in own)
        part = tuple(
            slice(c.start - s.start // STRIDE, c.stop - s.start // STRIDE)
            for c, s in zip(cells, (rows, columns), strict=True)
        )
        for whole, values in zip((bend, judged), found, strict=True):
            whole[(slice(None), *cells)] = values[(slice(None), *part)]

    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(work, tiles(fixed.shape)):
            pass
    if flow:
        bend = np.stack([ndimage.gaussian_filter(component, EVEN) for component in bend])
    return Warp(warp.matrix, bend), judged


def _refine_tile(fixed: Floats, moving: Image, warp: Warp, places: Floats, flow: Flow | None) -> tuple[Floats, Floats]:
    """-> bend [2, ...] and what is judged [3, ...], of the cells of a window."""
    found, there = sample(moving, warp(places))
    ours = normalised(fixed)
    # What lies outside shows what the fixed image shows: there is no flow to see.
    theirs = np.where(there, normalised(found), ours).astype(np.float32)
    displacement, inconsistency = np.zeros_like(places), np.zeros_like(fixed)
    if flow and there.any():
        displacement, back = flow(ours, theirs), flow(theirs, ours)
        local = places_of(fixed.shape) + displacement
        returned = np.stack([ndimage.map_coordinates(b, local, order=1, mode="nearest") for b in back])
        inconsistency = np.hypot(*(displacement + returned))
        found, there = sample(moving, warp(places + displacement))
    judged = np.stack([correlated(fixed, found, there), inconsistency, there.astype(np.float32)])
    return cell_means(warp.after(displacement, places)), cell_means(judged)


def correlated(first: Floats, second: Floats, there: NDArray[np.bool_]) -> Floats:
    """Pearson correlation of two images around every pixel, of what is ``there``; 0 where one of them is constant."""
    a, b = (ndimage.gaussian_filter(image.astype(np.float64), SEEN) for image in (first, second))
    a, b = a - a.mean(), b - b.mean()
    weight = ndimage.gaussian_filter(there.astype(np.float64), AROUND) + 1e-9
    mean_a, mean_b, square_a, square_b, product = (
        ndimage.gaussian_filter(image * there, AROUND) / weight for image in (a, b, a * a, b * b, a * b)
    )
    power = np.clip(square_a - mean_a**2, 0, None) * np.clip(square_b - mean_b**2, 0, None)
    return np.asarray((product - mean_a * mean_b) / np.sqrt(power + 1e-9), np.float32)


def tiles(shape: tuple[int, ...]) -> Iterator[tuple[Window, Window]]:
    """-> (what a tile owns, that with its halo), windows that begin on cells."""
    spans = []
    for n in shape:
        # An image that is not much larger than a tile is one.
        side = n if n <= TILE + 2 * HALO else TILE
        starts = range(0, n, max(side, 1))
        spans.append([((a, min(a + side, n)), (max(0, a - HALO), min(n, a + side + HALO))) for a in starts])
    for y, wide_y in spans[0]:
        for x, wide_x in spans[1]:
            yield (slice(*y), slice(*x)), (slice(*wide_y), slice(*wide_x))


@dataclass(frozen=True)
class Binned:
    """An image whose pixels are the means of step x step pixels of another; what is left over at the far borders of
    that is cut off."""

    image: Image
    step: int

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.image.shape
        return height // self.step, width // self.step

    def __getitem__(self, window: tuple[slice, slice]) -> Floats:
        rows, columns = (s.indices(n)[:2] for s, n in zip(window, self.shape, strict=True))
        (top, bottom), (left, right), step = rows, columns, self.step
        part = np.asarray(self.image[top * step : bottom * step, left * step : right * step], np.float32)
        return np.asarray(part.reshape(bottom - top, step, right - left, step).mean(axis=(1, 3)), np.float32)


def overview(image: Image, step: int) -> Floats:
    """All of ``Binned(image, step)``, read in bands."""
    small = Binned(image, step)
    height, width = small.shape
    rows = max(1, BAND // (width * step * step))
    return np.concatenate([small[top : min(top + rows, height), 0:width] for top in range(0, height, rows)])


def overview_step(*images: Image) -> int:
    """Pixels that make one of an overview."""
    return max(1, -(-max(n for image in images for n in image.shape) // OVERVIEW))
