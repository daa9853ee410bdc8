"""Whether the planes between blocks or tiles can be told from the others.

Convention: face p of an axis lies between voxels p and p + 1, so a block that ends at voxel n (exclusive) has its
face n - 1. The statistic is the mean absolute difference across the given faces over that across all others; 1 means
no seam. Differences are means over a face, so those of a long volume may be computed piece by piece along the axis.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import hypot
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Seam:
    """error: standard error of the ratio where there is no seam, from the scatter of the other faces."""

    ratio: float
    error: float

    @property
    def deviation(self) -> float:
        """The ratio's distance from 1 in standard errors."""
        return (self.ratio - 1) / self.error


def face_differences(image: NDArray[Any], axis: int) -> NDArray[np.float64]:
    """[z, y, x] with n voxels along the axis -> mean absolute difference across each of its n - 1 faces."""
    planes = np.moveaxis(image, axis, 0).astype(np.float32)
    across: NDArray[np.float64] = np.abs(np.diff(planes, axis=0)).mean(axis=(1, 2), dtype=np.float64)
    return across


def seam(differences: NDArray[np.float64], faces: Iterable[int]) -> Seam:
    """differences: of all faces of an axis, without those that are unlike the others for another reason."""
    at = np.zeros(len(differences), bool)
    at[list(faces)] = True
    across, interior = differences[at], differences[~at]
    assert across.size, "no faces to test"
    assert interior.size > 1, "no faces to compare with"
    level = interior.mean()
    # Under the hypothesis of no seam, faces of both kinds scatter alike.
    scatter = interior.std(ddof=1) / level
    return Seam(float(across.mean() / level), float(scatter * hypot(across.size**-0.5, interior.size**-0.5)))
