"""Scores of a reconstruction against a truth, on the planes that were predicted.

Convention: both volumes have the same y, x and plane spacing, and the same first plane; the truth may have more planes
after the last one. Only missing planes count: measured ones are copies of the input. Linear interpolation of the
measured planes is scored on the very same voxels, and the gain is over that. Volumes are read in blocks of about
``PLANES`` x ``TILE`` x ``TILE`` voxels, whatever their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box, ceil_div
from emdiffuse_vol.metrics.image import HALO, ImageScore, score_image
from emdiffuse_vol.metrics.interpolation import linear_at
from emdiffuse_vol.metrics.spread import Z90, SpreadScore, coverage_curve, normal_crps, score_spread
from emdiffuse_vol.stores.volume import Volume

PLANES, TILE = 64, 256
LEVELS = np.arange(1, 20) / 20  # of the intervals whose coverage is taken
Mask = NDArray[np.bool_]


def evaluate(
    reconstruction: Volume,
    uncertainty: Volume | None,
    truth: Volume,
    missing: Callable[[NDArray[np.int64]], Mask] | Mask,
    *,
    step: float = 1.0,
    baseline: bool = True,
    data_range: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """JSON values. missing: which planes of the reconstruction were predicted, or a function of plane numbers.

    uncertainty: codes, greys = code * step. baseline: score linear interpolation too; left out (None) as well where a
    missing plane has no measured one on either side. data_range: of the PSNR and SSIM; from the truth's dtype if None.
    progress: called with blocks done and in all. Raises InputError.
    """
    planes = common_planes(reconstruction, truth)
    mask = missing(np.arange(planes)) if callable(missing) else missing[:planes]
    if not mask.any():
        raise InputError(f"{reconstruction.url} has no predicted planes among its {planes}; check --factor")
    measured = np.flatnonzero(~mask)
    wanted = np.flatnonzero(mask)
    bracketed = bool(measured.size) and bool(measured[0] < wanted[0] and wanted[-1] < measured[-1])
    data_range = data_range or range_of(truth)
    ours, linear, spread = ImageScore(data_range), ImageScore(data_range), SpreadScore()
    crps, covered = 0.0, np.zeros(len(LEVELS))
    baseline = baseline and bracketed
    blocks = list(_slabs(mask, measured if baseline else None))
    _, height, width = reconstruction.spec.shape
    tiles = ceil_div(height, TILE) * ceil_div(width, TILE)
    progress(0, len(blocks) * tiles)
    for i, (first, last) in enumerate(blocks):
        chosen = np.flatnonzero(mask[first:last])
        for j, (box, core) in enumerate(_tiles(first, last, height, width)):
            greys, true = reconstruction.read(box), truth.read(box)[chosen]
            ours += score_image(greys[chosen], true, data_range, core)
            if baseline:
                linear += score_image(_linear(greys, mask[first:last])[chosen], true, data_range, core)
            if uncertainty is not None:
                inner: Any = (slice(None), *core)
                sigma = uncertainty.read(box)[chosen][inner] * np.float32(step)
                mean, sought = greys[chosen][inner], true[inner]
                spread += score_spread(mean, sigma, sought)
                crps += normal_crps(mean, sigma, sought) * sigma.size
                covered += coverage_curve(mean, sigma, sought, LEVELS) * sigma.size
            progress(i * tiles + j + 1, len(blocks) * tiles)
    result = {
        "shape": list(reconstruction.spec.shape),
        "truth_shape": list(truth.spec.shape),
        "planes": {"common": planes, "missing": int(mask.sum())},
        "voxels": ours.voxels,
        "data_range": data_range,
        "reconstruction": {"psnr": ours.psnr, "ssim": ours.ssim},
        "linear": {"psnr": linear.psnr, "ssim": linear.ssim} if baseline else None,
        "gain": {"psnr": ours.psnr - linear.psnr, "ssim": ours.ssim - linear.ssim} if baseline else None,
        "uncertainty": None,
    }
    if uncertainty is not None:
        result["uncertainty"] = {
            "z": Z90,
            "nominal": 0.9,
            "coverage": spread.coverage,
            "spread_skill": spread.spread_skill,
            "crps": crps / spread.voxels,
            "levels": LEVELS.tolist(),
            "coverage_of_levels": (covered / spread.voxels).tolist(),
        }
    return result


def common_planes(reconstruction: Volume, truth: Volume) -> int:
    ours, true = reconstruction.spec.shape, truth.spec.shape
    if ours[1:] != true[1:] or ours[0] > true[0]:
        raise InputError(
            f"the reconstruction has shape {ours}, the truth {true}; expected the same y and x, and a truth with at "
            "least as many planes"
        )
    return ours[0]


def range_of(truth: Volume) -> float:
    if truth.spec.dtype == "float32":
        raise InputError("the truth holds float32, whose range of greys is not known; give --data-range")
    info = np.iinfo(truth.spec.dtype)
    return float(info.max) - float(info.min)


def _slabs(mask: Mask, measured: NDArray[np.int64] | None) -> Iterator[tuple[int, int]]:
    """Half-open ranges of planes which hold every missing plane once. With ``measured``, they begin and end with a
    measured plane, which neighbours share, so that the planes within can be interpolated."""
    if measured is None:
        yield from ((z, min(z + PLANES, len(mask))) for z in range(0, len(mask), PLANES) if mask[z : z + PLANES].any())
        return
    first = 0
    while first < len(measured) - 1:
        reach = int(np.searchsorted(measured, measured[first] + PLANES, side="right")) - 1
        last = min(max(reach, first + 1), len(measured) - 1)
        a, b = int(measured[first]), int(measured[last]) + 1
        if mask[a:b].any():
            yield a, b
        first = last


def _tiles(first: int, last: int, height: int, width: int) -> Iterator[tuple[Box, tuple[slice, slice]]]:
    """Boxes with the margin that SSIM needs, and in each the pixels y, x that are its own."""
    for y in range(0, height, TILE):
        for x in range(0, width, TILE):
            spans = [(a, min(a + TILE, n), n) for a, n in ((y, height), (x, width))]
            (y0, y1), (x0, x1) = ((max(0, a - HALO), min(b + HALO, n)) for a, b, n in spans)
            core = slice(y - y0, spans[0][1] - y0), slice(x - x0, spans[1][1] - x0)
            yield Box((first, y0, x0), (last, y1, x1)), core


def _linear(greys: NDArray[Any], mask: Mask) -> NDArray[np.float32]:
    """A slab [z, y, x] that begins and ends with a measured plane -> the same, interpolated between those."""
    measured, planes = np.flatnonzero(~mask), np.arange(len(mask))
    position = np.interp(planes, measured, np.arange(len(measured)))
    below = np.floor(position).astype(np.int64)
    return linear_at(greys[measured], below, (position - below).astype(np.float32))
