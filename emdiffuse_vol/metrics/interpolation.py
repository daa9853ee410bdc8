"""Interpolation along z: the baselines that every network must beat.

Convention: sections [s, y, x] in any dtype -> planes [p, y, x] float32, plane i at position i / factor, counted in
sections (see ``geometry.axial``); a plane on a section is that section, exactly.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.axial import AxialGrid
from emdiffuse_vol.geometry.boxes import reflect

Planes = NDArray[np.float32]


def linear(sections: NDArray[Any], factor: Fraction | int) -> Planes:
    return linear_at(sections, *_places(len(sections), factor))


def cubic(sections: NDArray[Any], factor: Fraction | int) -> Planes:
    """Catmull-Rom: through the sections, slopes from both neighbours; sections are mirrored at both ends."""
    below, t = _places(len(sections), factor)
    a, b, c, d = (_take(sections, reflect(below + k, len(sections))) for k in (-1, 0, 1, 2))
    u = t[:, None, None]
    slope, far_slope = (c - a) / 2, (d - b) / 2
    planes = b + u * (slope + u * (3 * (c - b) - 2 * slope - far_slope + u * (2 * (b - c) + slope + far_slope)))
    return np.asarray(planes, np.float32)


def linear_at(sections: NDArray[Any], below: NDArray[np.int64], t: Planes) -> Planes:
    """below: the section at or below each plane; t: how far it is towards the next, in [0, 1)."""
    first, second = _take(sections, below), _take(sections, np.minimum(below + 1, len(sections) - 1))
    return first + t[:, None, None] * (second - first)


def _places(sections: int, factor: Fraction | int) -> tuple[NDArray[np.int64], Planes]:
    grid = AxialGrid(sections, Fraction(factor))
    return grid.locate(np.arange(grid.planes))


def _take(sections: NDArray[Any], index: NDArray[np.int64]) -> Planes:
    return sections[index].astype(np.float32)
