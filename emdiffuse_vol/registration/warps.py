"""Where the places of a fixed image lie in a moving one.

Convention: places and displacements are (y, x) in pixels, arrays of them [2, ...]; the centre of the first pixel is
(0, 0). A warp takes a place p of the fixed image to ``matrix(p + u(p))`` in the moving image: resampling pulls greys
from there. u is smooth, and kept as its means over *cells* of STRIDE x STRIDE pixels, [2, cells_y, cells_x]; between
their centres it is a cubic spline. Places outside an image are those in none of its pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

STRIDE = 8
SPLINE = 16  # pixels of the border that a cubic spline still feels

Floats = NDArray[np.floating[Any]]
Matrix = NDArray[np.floating[Any]]  # [3, 3], of homogeneous (y, x, 1)


class Image(Protocol):
    """Greys [y, x], or what gives them when sliced."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, window: tuple[slice, slice], /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Warp:
    matrix: Matrix
    bend: Floats

    @staticmethod
    def rigid(matrix: Matrix, shape: tuple[int, ...]) -> Warp:
        """Without bend. shape: of the fixed image."""
        return Warp(matrix, np.zeros((2, *cell_shape(shape)), np.float32))

    def __call__(self, places: Floats) -> Floats:
        return transformed(self.matrix, places + at_cells(self.bend, places))

    def after(self, displacement: Floats, places: Floats) -> Floats:
        """Bend, at places, of the warp that takes them to ``self(place + displacement)``."""
        return displacement + at_cells(self.bend, places + displacement)

    def enlarged(self, factor: int, shape: tuple[int, ...]) -> Warp:
        """The same warp for images of ``factor`` times as many pixels, of which the fixed one has ``shape``."""
        grow = pixel_scale(factor)
        cells = places_of(cell_shape(shape)) * STRIDE + (STRIDE - 1) / 2
        bend = at_cells(self.bend, transformed(np.linalg.inv(grow), cells)) * factor
        return Warp(grow @ self.matrix @ np.linalg.inv(grow), bend.astype(np.float32))


def pixel_scale(factor: int) -> Matrix:
    """Places of an image -> those of the image with ``factor`` times as many pixels."""
    shift = (factor - 1) / 2
    return np.array([[factor, 0, shift], [0, factor, shift], [0, 0, 1]], float)


def transformed(matrix: Matrix, places: Floats) -> Floats:
    flat = places.reshape(2, -1)
    moved = matrix[:, :2] @ flat + matrix[:, 2:]
    return np.asarray((moved[:2] / moved[2]).reshape(places.shape))


def places_of(shape: tuple[int, ...], start: tuple[int, int] = (0, 0)) -> Floats:
    """[2, y, x] of all pixels of a window that starts at a pixel."""
    return np.mgrid[start[0] : start[0] + shape[0], start[1] : start[1] + shape[1]].astype(np.float64)


def inside(places: Floats, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    y, x = places
    return np.asarray((y >= -0.5) & (y <= shape[0] - 0.5) & (x >= -0.5) & (x <= shape[1] - 0.5))


def sample(image: Image, places: Floats, order: int = 3) -> tuple[Floats, NDArray[np.bool_]]:
    """-> greys float32 at places [2, y, x] by spline interpolation, and which places are inside. Beyond the image its
    border goes on. Only the part of the image that is needed is read."""
    there = inside(places, image.shape)
    if not there.any():
        return np.zeros(places.shape[1:], np.float32), there
    window, local = needed(image.shape, places, there)
    return ndimage.map_coordinates(np.asarray(image[window], np.float32), local, order=order, mode="nearest"), there


def needed(shape: tuple[int, ...], places: Floats, there: Any = True) -> tuple[tuple[slice, slice], Floats]:
    """-> the window of an image that its spline needs at the places that are ``there``, and all places in it."""
    spans = []
    for p, n in zip(places, shape, strict=True):
        low, high = (float(f(p, where=there, initial=i)) for f, i in ((np.min, n - 1), (np.max, 0)))
        spans.append(slice(max(0, int(low) - SPLINE), min(n, int(high) + SPLINE + 2)))
    y, x = spans
    return (y, x), places - np.array([y.start, x.start], float).reshape(2, *[1] * (places.ndim - 1))


def cell_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return -(-shape[0] // STRIDE), -(-shape[1] // STRIDE)


def cell_means(values: Floats) -> Floats:
    """Means over cells [..., cells_y, cells_x] of values [..., y, x]; cells at the far border may be cut short."""
    height, width = values.shape[-2:]
    sums = np.add.reduceat(values, np.arange(0, height, STRIDE), axis=-2)
    sums = np.add.reduceat(sums, np.arange(0, width, STRIDE), axis=-1)
    rows, columns = (np.diff(np.append(np.arange(0, n, STRIDE), n)) for n in (height, width))
    return np.asarray(sums / (rows[:, None] * columns), np.float32)


def in_pixels(cells: NDArray[Any]) -> NDArray[Any]:
    """Cells [..., cells_y, cells_x] as pixels, up to whole cells."""
    return np.repeat(np.repeat(cells, STRIDE, axis=-2), STRIDE, axis=-1)


def at_cells(cells: Floats, places: Floats) -> Floats:
    """Values [n, ...] at places [2, ...] of cells [n, cells_y, cells_x]; beyond the outermost centres they stay."""
    if not cells.any():
        return np.zeros((len(cells), *places.shape[1:]), np.float32)
    window, where = needed(cells.shape[1:], (places - (STRIDE - 1) / 2) / STRIDE)
    parts = (c[window] for c in cells)
    return np.stack([ndimage.map_coordinates(c, where, order=3, mode="nearest", output=np.float32) for c in parts])


def covered(matrix: Matrix, fixed: tuple[int, ...], moving: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which cells of the fixed image lie wholly inside the moving one: straight lines stay straight, so those whose
    corners do."""
    first = places_of(cell_shape(fixed)) * STRIDE
    last = np.minimum(first + STRIDE - 1, np.array(fixed, float)[:, None, None] - 1)
    corners = (first, last, np.stack([first[0], last[1]]), np.stack([last[0], first[1]]))
    return np.asarray(np.logical_and.reduce([inside(transformed(matrix, corner), moving) for corner in corners]))
