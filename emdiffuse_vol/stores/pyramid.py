"""Coarser copies of an image, each half the one before along z, y and x.

Convention: voxel (i, j, k) of a level is the mean of the cell 2i..2i+1, 2j..2j+1, 2k..2k+1 of the finer level, or of
what part of it there is at an odd border. Every value depends on its own cell only, so a level may be made in pieces
of any size that start at even voxels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Triple, ceil_div


def half(shape: Triple) -> Triple:
    z, y, x = (ceil_div(n, 2) for n in shape)
    return z, y, x


def pyramid_shapes(shape: Triple, smallest: int = 256) -> list[Triple]:
    """Shapes z y x of all levels, the full one first, until none of the three sizes is above ``smallest``."""
    shapes = [shape]
    while max(shapes[-1]) > smallest:
        shapes.append(half(shapes[-1]))
    return shapes


def downsample(block: NDArray[Any]) -> NDArray[Any]:
    """Means over 2x2x2 cells of [z, y, x] or [c, z, y, x], in the dtype given; integers round half to even."""
    odd = [(0, n % 2) for n in block.shape[-3:]]
    # Repeating the border voxel leaves the mean of what is there, and makes every cell whole.
    whole = np.pad(block, [(0, 0)] * (block.ndim - 3) + odd, mode="edge")
    integer = np.issubdtype(block.dtype, np.integer)
    cells = (*whole.shape[:-3], *(n // 2 for n in whole.shape[-3:]))
    total = np.zeros(cells, dtype=np.int32 if integer else np.float64)
    for corner in np.ndindex(2, 2, 2):
        cell: Any = (..., *(slice(start, None, 2) for start in corner))
        total += whole[cell]
    if not integer:
        return (total / 8).astype(block.dtype)
    # total / 8 rounded half to even: add 3, and 1 more when the quotient is odd.
    return ((total + 3 + ((total >> 3) & 1)) >> 3).astype(block.dtype)
