"""Drift of a stack: what each section is moved by, from how it lies on the one before.

Convention: ``steps[k]`` takes places (y, x) of section k - 1 to those of section k. Their product takes the frame of
section 0 to any section; it holds the drift, and everything else that changes from section to section: errors, which
add up, and structures that run through the stack at a slant, which would be bent upright.

So the product is not taken as it is. Its mean over neighbouring sections, with Gaussian weights of ``window`` sections
(standard deviation), stays in the stack; only what differs from that is taken away. No section is therefore moved by
more than the stack drifts within such a neighbourhood, however long the stack is; slants and drifts that are even over
many windows are left as they were. A stack much shorter than the window keeps only its mean place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from emdiffuse_vol.registration.warps import Matrix


def accumulated(steps: Sequence[Matrix]) -> NDArray[np.float64]:
    """[n, 3, 3]: the frame of section 0 to that of each section. steps[0] is of section 0, the identity."""
    found = [np.eye(3)]
    for step in steps[1:]:
        found.append(step @ found[-1])
    return np.stack([matrix / matrix[2, 2] for matrix in found])


def corrections(steps: Sequence[Matrix], window: float, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """[n, 3, 3]: places of the aligned stack to those of each section. shape: of a section, about whose middle matrices
    are averaged."""
    middle = np.eye(3)
    middle[:2, 2] = (np.array(shape) - 1) / 2
    whole = np.linalg.inv(middle) @ accumulated(steps) @ middle
    ones = gaussian_filter1d(np.ones(len(whole)), window, mode="constant")
    slow = gaussian_filter1d(whole, window, axis=0, mode="constant") / ones[:, None, None]
    return np.asarray(middle @ whole @ np.linalg.inv(slow) @ np.linalg.inv(middle))
