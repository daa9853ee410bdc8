"""Calibration: one scale per gap that makes the spread honest.

Convention: mean +- 1.645 * scale * spread is to hold the truth in 90 % of the predicted voxels. The scale is the 90th
percentile of |error| / (1.645 * spread) on a part of a volume that no weight was trained on, and the coverage is
measured on another such part. Both go through the engine a user runs, stored codes included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.reconstruct.lazy import isotropic

LEVEL, QUANTILE = 0.9, 1.645


@dataclass(frozen=True)
class Calibration:
    """gap in lateral pixels -> scale, and the coverage it gave elsewhere."""

    scale: dict[str, float]
    coverage: dict[str, float]
    members: int


def calibrate(
    weights: str,
    volume: NDArray[Any],
    fit_on: Box,
    measure_on: Box,
    gaps: tuple[int, ...],
    members: int = 4,
    **settings: Any,
) -> Calibration:
    """volume: isotropic greys [z, y, x]; boxes: parts of it that training has not seen; settings: of ``isotropic``."""
    scale, coverage = {}, {}
    settings["members"] = members
    for gap in gaps:
        error, spread = residuals(weights, volume, fit_on, gap, **settings)
        ratio = error / (QUANTILE * np.maximum(spread, 1e-6))
        scale[str(gap)] = round(float(np.quantile(ratio, LEVEL)), 4)
        error, spread = residuals(weights, volume, measure_on, gap, **settings)
        coverage[str(gap)] = round(float((error <= QUANTILE * scale[str(gap)] * spread).mean()), 4)
    return Calibration(scale, coverage, members)


def residuals(
    weights: str, volume: NDArray[Any], box: Box, gap: int, **settings: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Absolute error of the mean and the spread, in greys, on the hidden planes of a box."""
    import xarray as xr

    sections = volume[::gap]
    first, last = -(-box.start[0] // gap), (box.stop[0] - 1) // gap
    roi = Box((first, *box.start[1:]), (last + 1, *box.stop[1:]))
    result = isotropic(
        xr.DataArray(sections, dims=("z", "y", "x")),
        voxel_size=(float(gap), 1.0, 1.0),
        weights=weights,
        roi=str(roi),
        **settings,
    ).compute(scheduler="synchronous")
    truth = volume[first * gap : last * gap + 1, *roi.slices()[1:]]
    hidden = np.arange(truth.shape[0]) % gap != 0
    error = np.abs(result["mean"].values.astype(np.float32) - truth)[hidden]
    return error, result["uncertainty"].values[hidden]
