"""How noisy sections are, from the greys alone, and whether a stack is evenly so.

Convention: the level is the standard deviation of noise that is independent from pixel to pixel, in the greys of the
image. It is the median absolute diagonal difference of 2 x 2 cells (the finest Haar coefficient; Donoho and Johnstone
1994, doi:10.1093/biomet/81.3.425), so edges, which are few, hardly count; fine texture adds to it, and noise that an
alignment has smoothed is underestimated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

NORMAL = 0.6745  # median of |N(0, 1)|
UNEVEN = 1.5


def noise_levels(sections: NDArray[Any]) -> NDArray[np.float64]:
    """[z, y, x] of at least 2 x 2 pixels -> [z]."""
    y, x = (n // 2 * 2 for n in sections.shape[1:])
    a, b, c, d = (sections[:, i:y:2, j:x:2].astype(np.float64) for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)))
    detail = np.abs(a - b - c + d) / 2
    levels: NDArray[np.float64] = np.median(detail, axis=(1, 2)) / NORMAL
    return levels


def uneven_sections(levels: NDArray[np.float64]) -> NDArray[np.int64]:
    """Numbers of the sections that are noisier or less noisy than their median by more than ``UNEVEN`` times."""
    middle = np.median(levels)
    return np.flatnonzero((levels > UNEVEN * middle) | (levels < middle / UNEVEN))
