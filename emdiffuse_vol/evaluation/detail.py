"""Scores that take more than voxel by voxel: features, what networks see, frequencies.

Convention: as in ``evaluation.scores``, but on regions of at most ``DEPTH`` x ``SIDE`` x ``SIDE`` voxels, at most two
along each axis, evenly spread: time and memory do not grow with the volume, and a small one is its own region. FSIM,
LPIPS and rings are of at most ``PLANES`` missing planes of each region, shells and power of whole regions, measured
planes included. Numbers and curves are means over regions. Resolutions are in nm, at a correlation of 1/7.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.metrics.features import feature_similarity, features
from emdiffuse_vol.metrics.interpolation import linear_at
from emdiffuse_vol.metrics.perceptual import SMALLEST, Gaussian, Lpips, frechet_distance
from emdiffuse_vol.metrics.spectra import (
    Shells,
    axial_correlation,
    axial_power,
    relative_power,
    resolution,
    ring_correlation,
)
from emdiffuse_vol.stores.volume import Nanometres, Volume

DEPTH, SIDE, PLANES = 128, 256, 8
THINNEST = 16  # voxels along each axis of a region whose frequencies are looked at
Mask = NDArray[np.bool_]
RESOLUTIONS = {"fsc_z": (0, "resolution_z_nm"), "frc_xy": (2, "resolution_xy_nm")}  # axis and name


def detail(
    reconstruction: Volume,
    truth: Volume,
    mask: Mask,
    *,
    data_range: float,
    baseline: bool = True,
    lpips: Lpips | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """JSON values. mask: which planes of the reconstruction were predicted; the others are measured. baseline: score
    linear interpolation, too, where there are measured planes on either side of a region."""
    depth, height, width = reconstruction.spec.shape
    boxes = [box for box in regions((min(depth, len(mask)), height, width)) if mask[box.start[0] : box.stop[0]].any()]
    scores: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    seen: dict[str, Gaussian] = {}
    for i, box in enumerate(boxes):
        progress(i, len(boxes))
        true = truth.read(box)
        images = {"reconstruction": reconstruction.read(box)}
        if baseline and (between := _interpolated(reconstruction, box, mask)) is not None:
            images["linear"] = between
        for name, found in _region(images, true, mask[box.start[0] : box.stop[0]], data_range, lpips, seen):
            for what, value in found.items():
                scores[name][what].append(value)
    progress(len(boxes), len(boxes))
    return _summary(scores, seen, boxes, reconstruction.spec.voxel_size)


def regions(shape: Triple) -> Iterator[Box]:
    """Of one shape; their order is that of z, y, x."""
    sizes = [min(n, most) for n, most in zip(shape, (DEPTH, SIDE, SIDE), strict=True)]
    starts = [
        [(n - s) // 2] if n < 2 * s else [n // 4 - s // 2, n - n // 4 - (s - s // 2)]
        for n, s in zip(shape, sizes, strict=True)
    ]
    for z, y, x in product(*starts):
        yield Box((z, y, x), (z + sizes[0], y + sizes[1], x + sizes[2]))


def _interpolated(volume: Volume, box: Box, mask: Mask) -> NDArray[np.float32] | None:
    """Of the measured planes around and within a box; None where one side has none."""
    measured = np.flatnonzero(~mask)
    first = int(np.searchsorted(measured, box.start[0], side="right")) - 1
    last = int(np.searchsorted(measured, box.stop[0] - 1))
    if first < 0 or last == len(measured):
        return None
    known = measured[first : last + 1]
    _, y, x = box.slices()
    greys = np.concatenate([volume.read(Box((int(z), y.start, x.start), (int(z) + 1, y.stop, x.stop))) for z in known])
    position = np.interp(np.arange(box.start[0], box.stop[0]), known, np.arange(len(known)))
    below = np.floor(position).astype(np.int64)
    return linear_at(greys, below, (position - below).astype(np.float32))


def _region(
    images: dict[str, NDArray[Any]],
    true: NDArray[Any],
    mask: Mask,
    data_range: float,
    lpips: Lpips | None,
    seen: dict[str, Gaussian],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and scores of each image, the truth's own among them. seen: what the network saw, added to."""
    missing = np.flatnonzero(mask)
    chosen = missing[np.unique(np.linspace(0, len(missing) - 1, min(PLANES, len(missing))).round().astype(int))]
    thick, wide = min(true.shape) >= THINNEST, min(true.shape[1:]) >= THINNEST
    of_truth = features(true[chosen], data_range)
    low = np.iinfo(true.dtype).min if np.issubdtype(true.dtype, np.integer) else 0
    look = lpips if lpips and min(true.shape[1:]) >= SMALLEST else None

    def maps(image: NDArray[Any], name: str) -> Any:
        assert look is not None
        found = look.features((image[chosen].astype(np.float32) - low) * (255 / data_range))
        vectors = found[-1].movedim(1, -1).flatten(0, 2).cpu().numpy()
        seen.setdefault(name, Gaussian(vectors.shape[1])).add(vectors)
        return found

    maps_of_truth: Any = maps(true, "truth") if look else None
    power = axial_power(true) if thick else None
    yield "truth", {"power_z": power} if power else {}
    for name, image in images.items():
        similar = feature_similarity(features(image[chosen], data_range), of_truth)
        found: dict[str, Any] = {"fsim": float(similar.mean())}
        if look:
            found["lpips"] = float(look.distance(maps(image, name), maps_of_truth).mean())
        if wide:
            found["frc_xy"] = ring_correlation(image[chosen], true[chosen])
        if power:
            found |= {"fsc_z": axial_correlation(image, true), "power_z": axial_power(image)}
            found["detail_z"] = relative_power(found["power_z"], power)
        yield name, found


def _summary(scores: Any, seen: dict[str, Gaussian], boxes: list[Box], sizes: Nanometres) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    result: dict[str, Any] = {"regions": len(boxes), "region": list(boxes[0].shape), "linear": None, "curves": curves}
    for name, found in scores.items():
        row: dict[str, Any] = {}
        for what, values in found.items():
            if not isinstance(values[0], Shells):
                row[what] = float(np.mean(values))
                continue
            mean = Shells(values[0].frequency, np.mean([v.value for v in values], axis=0))
            curves.setdefault(what, {"frequency": mean.frequency.tolist()})[name] = mean.value.tolist()
            if what in RESOLUTIONS:
                axis, called = RESOLUTIONS[what]
                row[called] = resolution(mean) * sizes[axis]
        if name in seen and name != "truth":
            row["frechet_alexnet"] = frechet_distance(seen[name], seen["truth"])
        if name != "truth":
            result[name] = row
    return result
