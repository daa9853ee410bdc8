"""Calibration: one scale per gap that makes the spread honest.

Convention: mean +- 1.645 * scale * spread is to hold the truth in 90 % of the predicted voxels. The scale is the 90th
percentile of |error| / (1.645 * spread) on a part of the data that no weight was trained on, and the coverage is
measured on another such part, as is its scatter over whole blocks, since neighbouring voxels are not exchangeable. Both
go through the engine a user runs, stored codes included. Of an anisotropic stack planes are hidden along y and x, where
there is truth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.reconstruct.greys import Codes, GreyMap
from emdiffuse_vol.reconstruct.lazy import isotropic
from emdiffuse_vol.training.objectives import orientations
from emdiffuse_vol.training.volumes import TrainingVolume

LEVEL, QUANTILE = 0.9, 1.645
BLOCK = 32  # pixels: side of the columns whose coverage is compared


@dataclass(frozen=True)
class HeldOut:
    """A part of the data that no weight was trained on, and how its greys were stored."""

    volume: TrainingVolume
    greys: GreyMap
    dtype: str

    def halves(self) -> tuple[HeldOut, HeldOut]:
        """Cut across y: one to fit on, one to measure on."""
        half = self.volume.greys.shape[1] // 2
        lower, upper = (self.volume.part((slice(None), part)) for part in (slice(0, half), slice(half, None)))
        return HeldOut(lower, self.greys, self.dtype), HeldOut(upper, self.greys, self.dtype)


@dataclass(frozen=True)
class Calibration:
    """gap in lateral pixels -> scale, the coverage it gave elsewhere, and the scatter of that over blocks (its standard
    deviation)."""

    scale: dict[str, float] = field(default_factory=dict)
    coverage: dict[str, float] = field(default_factory=dict)
    scatter: dict[str, float] = field(default_factory=dict)
    members: int = 4


def calibrate(
    weights: str,
    fit_on: list[HeldOut],
    measure_on: list[HeldOut],
    gaps: tuple[int, ...],
    members: int = 4,
    **settings: Any,
) -> Calibration:
    """settings: of ``isotropic``. Gaps that no part is long enough for are left out."""
    result = Calibration(members=members)
    settings["members"] = members
    for gap in gaps:
        first, second = (
            [r for held in parts for r in residuals(weights, held, gap, **settings)] for parts in (fit_on, measure_on)
        )
        if not first or not second:
            continue
        ratio = np.concatenate([error / (QUANTILE * np.maximum(spread, 1e-6)) for error, spread in first])
        scale = result.scale[str(gap)] = round(float(np.quantile(ratio, LEVEL)), 4)
        inside = [error <= QUANTILE * scale * spread for error, spread in second]
        result.coverage[str(gap)] = round(float(np.mean(np.concatenate(inside))), 4)
        blocks = [b.mean() for part in inside for b in np.array_split(part, max(1, part.size // (BLOCK**2 * gap)))]
        result.scatter[str(gap)] = round(float(np.std(blocks)), 4)
    return result


def residuals(
    weights: str, held: HeldOut, gap: int, **settings: Any
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Absolute error of the mean and the spread, in greys, of the hidden voxels that were measured: flat, and one pair
    for each axis that planes can be hidden along."""
    import xarray as xr

    codes, result = Codes(held.dtype), []
    for turned in orientations(held.volume, 2 * gap):
        truth = codes.mean(held.greys.restore(turned.greys))
        made = isotropic(
            xr.DataArray(truth[::gap], dims=("z", "y", "x")),
            voxel_size=(float(gap), 1.0, 1.0),
            weights=weights,
            skip_empty=False,
            **settings,
        ).compute(scheduler="synchronous")
        truth = truth[: made.sizes["z"]]
        hidden = np.arange(len(truth)) % gap != 0
        known = turned.measured[: len(truth)][hidden] > 0
        if known.any():
            error = np.abs(made["mean"].values.astype(np.float32) - truth)[hidden][known]
            result.append((error, made["uncertainty"].values[hidden][known]))
    return result
