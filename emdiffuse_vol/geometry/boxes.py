"""Boxes of voxels.

Convention: half-open ``[start, stop)``, integers, axes z y x. A box may reach outside its volume (negative starts,
stops beyond the shape): what lies there is defined by mirroring, see :func:`reflect`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

Triple = tuple[int, int, int]
AXES = "zyx"


@dataclass(frozen=True, order=True)
class Box:
    start: Triple
    stop: Triple

    @staticmethod
    def of(shape: Triple) -> Box:
        return Box((0, 0, 0), shape)

    @property
    def shape(self) -> Triple:
        (a, b, c), (d, e, f) = self.start, self.stop
        return d - a, e - b, f - c

    @property
    def size(self) -> int:
        return 0 if self.empty else prod(self.shape)

    @property
    def empty(self) -> bool:
        return any(n <= 0 for n in self.shape)

    def shift(self, by: Triple) -> Box:
        return _box((a + d, b + d) for a, b, d in zip(self.start, self.stop, by, strict=True))

    def grow(self, by: Triple) -> Box:
        return _box((a - d, b + d) for a, b, d in zip(self.start, self.stop, by, strict=True))

    def __and__(self, other: Box) -> Box:
        """Intersection; where the boxes do not meet, an empty box."""
        return _box(
            (max(a, c), max(a, c, min(b, d)))
            for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True)
        )

    def __or__(self, other: Box) -> Box:
        """The smallest box that holds both."""
        return _box(
            (min(a, c), max(b, d)) for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True)
        )

    def __contains__(self, other: Box) -> bool:
        return all(a <= c and d <= b for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True))

    def slices(self, origin: Triple = (0, 0, 0)) -> tuple[slice, slice, slice]:
        """Index of this box in an array whose first voxel is ``origin``."""
        z, y, x = (slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, origin, strict=True))
        return z, y, x

    def __str__(self) -> str:
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True))


def _box(pairs: Iterator[tuple[int, int]]) -> Box:
    (a, d), (b, e), (c, f) = pairs
    return Box((a, b, c), (d, e, f))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def grid_shape(shape: Triple, cell: Triple) -> Triple:
    """How many cells cover a shape, along each axis."""
    z, y, x = (ceil_div(n, c) for n, c in zip(shape, cell, strict=True))
    return z, y, x


def cell_box(index: Triple, cell: Triple) -> Box:
    """Box of a grid cell, counted from the origin; it may reach beyond the shape."""
    return _box((i * c, (i + 1) * c) for i, c in zip(index, cell, strict=True))


def cells_meeting(box: Box, cell: Triple) -> Iterator[Triple]:
    """Indices of the cells that share voxels with ``box``, in z y x order."""
    z, y, x = (range(a // c, ceil_div(b, c)) for a, b, c in zip(box.start, box.stop, cell, strict=True))
    return product(z, y, x)


def reflect(index: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Mirror indices into [0, size) without repeating the border voxel (numpy's ``reflect``), however far outside."""
    period = max(2 * (size - 1), 1)
    index = np.abs(index) % period
    return np.minimum(index, period - index)
