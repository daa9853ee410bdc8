"""A first look at a volume: its greys and what seems wrong, from a sparse sample.

Convention: the sample is some runs of neighbouring sections, evenly spread over z, and in each run patches at the
centre and at the four quarter points. A section counts as constant when all its patches hold one grey, and as black
when that grey is 0. What is read stays below about a thousand small boxes, whatever the volume's size.

To find damaged sections, all sections are looked at, through the same patches: see :func:`damaged_sections`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.metrics.noise import noise_levels, uneven_sections
from emdiffuse_vol.stores.suspicions import axis_problems, contrast_problems
from emdiffuse_vol.stores.volume import Volume, VolumeSpec

PATCH = 64  # voxels along y and x
DEEPEST_RUN = 64  # sections
RUNS, SECTIONS = 16, 256  # at least so many runs, and more where runs are thin, if the volume has them
SATURATED = 0.01
FEWEST_LEVELS, OF_WIDTH = 5, 0.02  # sections whose noise is compared, and the least difference, of the greys' range
MOST_PATCHES = 100  # that are looked at for their contrast, about

# Of damaged sections. A grey is an outlier where it is far from the median of its neighbours on either side, by so many
# standard deviations of the change from section to section, and by so much of the range of greys.
NEIGHBOURS, DEVIATIONS, OF_RANGE = 8, 8.0, 0.25
LONGEST = 10  # more in a row are no damage: the specimen ends there, or is somewhere else
FINER = 8  # a section that seems constant is looked at again through FINER x FINER patches


@dataclass(frozen=True)
class Survey:
    """percentiles: 0.5, 50 and 99.5 % of the sampled greys of sections that are not constant. problems: one line each.
    factor: voxel size along z over the mean of y and x. noise: least, median and greatest of single sections, in greys,
    or None where no section tells."""

    sections: int
    percentiles: tuple[float, float, float]
    constant: tuple[int, ...]
    factor: float
    noise: tuple[float, float, float] | None
    problems: tuple[str, ...]


def factor_to_isotropy(spec: VolumeSpec) -> float:
    z, y, x = spec.voxel_size
    return z / ((y + x) / 2)


def survey(volume: Volume) -> Survey:
    """Raises InputError where the sample hits damage."""
    constant: dict[int, float] = {}
    levels: dict[int, float] = {}
    samples, patches, sections = [], [], 0
    for run in sample_runs(volume.spec):
        boxes = [volume.read(box) for box in run]
        columns = np.concatenate([box.reshape(len(box), -1) for box in boxes], axis=1)
        sections += len(columns)
        flat = columns.min(axis=1) == columns.max(axis=1)
        first = run[0].start[0]
        constant |= {first + int(i): float(columns[i, 0]) for i in np.flatnonzero(flat)}
        if min(boxes[0].shape[1:]) > 1:
            noise = np.median([noise_levels(box) for box in boxes], axis=0)
            levels |= {first + int(i): float(noise[i]) for i in np.flatnonzero(~flat & np.isfinite(noise))}
        samples.append(columns[~flat].ravel())
        patches += [box[np.flatnonzero(~flat)[0]].astype(np.float64) for box in boxes if not flat.all()]
    greys = np.concatenate(samples)
    finite = greys[np.isfinite(greys)]
    low, middle, high = np.percentile(finite if finite.size else [0], (0.5, 50, 99.5)).tolist()
    return Survey(
        sections=sections,
        percentiles=(low, middle, high),
        constant=tuple(constant),
        factor=factor_to_isotropy(volume.spec),
        noise=(min(found), float(np.median(found)), max(found)) if (found := list(levels.values())) else None,
        problems=(
            *_geometry_problems(volume.spec),
            *axis_problems(volume),
            *_section_problems(constant),
            *_grey_problems(greys),
            *_noise_problems(levels, high - low),
            *contrast_problems(patches[:: max(1, len(patches) // MOST_PATCHES)]),
        ),
    )


def sample_runs(spec: VolumeSpec) -> Iterator[list[Box]]:
    """Boxes of each run, a run at a time; runs start at chunk borders, so that no chunk is decoded for one plane."""
    thick = _thickness(spec)
    runs = -(-spec.shape[0] // thick)
    chosen = np.linspace(0, runs - 1, min(runs, max(RUNS, SECTIONS // thick))).round().astype(int).tolist()
    for run in chosen:
        yield _run(spec, run * thick, (run + 1) * thick)


def _thickness(spec: VolumeSpec) -> int:
    return min((spec.chunk or (1, 1, 1))[0], DEEPEST_RUN)


def _run(spec: VolumeSpec, start: int, stop: int) -> list[Box]:
    """Patches at the centre and at the quarter points, through sections ``start`` to ``stop``."""
    _, height, width = spec.shape
    places = ((2, 2), (1, 1), (1, 3), (3, 1), (3, 3))
    corners = dict.fromkeys((_corner(height, i, 4), _corner(width, j, 4)) for i, j in places)
    return _patches(spec, start, stop, corners)


def _patches(spec: VolumeSpec, start: int, stop: int, corners: Iterable[tuple[int, int]]) -> list[Box]:
    return [Box((start, y, x), (stop, y + PATCH, x + PATCH)) & Box.of(spec.shape) for y, x in corners]


def _corner(size: int, n: int, parts: int) -> int:
    """Start of a patch around n / parts of the width, inside the section where it fits."""
    return max(0, min(size * n // parts - PATCH // 2, size - PATCH))


def _columns(volume: Volume, boxes: list[Box]) -> NDArray[Any]:
    """[z, n] greys of patches through the same sections."""
    return np.concatenate([patch.reshape(len(patch), -1) for patch in map(volume.read, boxes)], axis=1)


def damaged_sections(volume: Volume) -> tuple[int, ...]:
    """Sections that are constant, or much darker or brighter than both those before and those after them.

    Every section is looked at, through small patches; what is kept are three numbers a section. Not found are sections
    damaged in parts, blurred or shifted, more than 4 dark ones in a row, and runs of over LONGEST constant ones. Raises
    InputError where a patch cannot be read.
    """
    thick, depth = _thickness(volume.spec), volume.spec.shape[0]
    flat, mean, width = np.empty(depth, bool), np.empty(depth), np.empty(depth)
    for start in range(0, depth, thick):
        run, columns = slice(start, start + thick), _columns(volume, _run(volume.spec, start, start + thick))
        flat[run], mean[run] = _flat(columns), columns.mean(axis=1, dtype=np.float64)
        low, high = np.percentile(columns, (0.5, 99.5), axis=1)
        width[run] = high - low
    runs = (run for run in _runs(np.flatnonzero(flat).tolist()) if len(run) <= LONGEST)
    constant = [z for run in runs for z in _confirmed(volume, run)]
    seen = np.flatnonzero(~flat)
    odd = seen[_outliers(mean[seen], width[seen])].tolist()
    return tuple(sorted(constant + odd))


def _flat(columns: NDArray[Any]) -> NDArray[np.bool_]:
    """[z, n] greys -> [z] whether a section is one grey, or holds no number at all."""
    return (columns == columns[:, :1]).all(axis=1) | ~np.isfinite(columns).any(axis=1)


def _confirmed(volume: Volume, run: list[int]) -> list[int]:
    """Those of neighbouring sections that are constant also through many more patches: tissue may be small."""
    _, height, width = volume.spec.shape
    places = product(range(1, 2 * FINER, 2), repeat=2)
    corners = dict.fromkeys((_corner(height, i, 2 * FINER), _corner(width, j, 2 * FINER)) for i, j in places)
    flat = _flat(_columns(volume, _patches(volume.spec, run[0], run[-1] + 1, corners)))
    return [z for z, still in zip(run, flat, strict=True) if still]


def _outliers(mean: NDArray[np.float64], width: NDArray[np.float64]) -> list[int]:
    """Indices of sections whose mean grey is far from the medians of those before and after, on the same side of both:
    a step, where tissue begins or the microscope was set anew, is no outlier."""
    if len(mean) < 3:
        return []
    deviation = 1.4826 * float(np.median(np.abs(np.diff(mean))))
    limit = max(DEVIATIONS * deviation, OF_RANGE * float(np.median(width)))
    found = []
    for k, grey in enumerate(mean):
        sides = [side for side in (mean[max(0, k - NEIGHBOURS) : k], mean[k + 1 : k + 1 + NEIGHBOURS]) if side.size]
        away = [grey - float(np.median(side)) for side in sides]
        if min(away) > limit or max(away) < -limit:
            found.append(k)
    return found


def _geometry_problems(spec: VolumeSpec) -> Iterator[str]:
    z, y, x = spec.voxel_size
    if factor_to_isotropy(spec) < 0.999:
        yield f"z ({z:g} nm) is finer than y and x ({(y + x) / 2:g} nm): check the voxel size and the axis order"
    if abs(y - x) > 0.01 * max(y, x):
        yield f"pixels are not square: y {y:g} nm, x {x:g} nm"


def _section_problems(constant: dict[int, float]) -> Iterator[str]:
    for what, black in (("black", True), ("constant", False)):
        found = sorted(z for z, grey in constant.items() if (grey == 0) == black)
        if found:
            yield f"{what} sections: {ranges(found)}"


def _grey_problems(greys: NDArray[Any]) -> Iterator[str]:
    """Integer greys that pile up at their smallest or largest: cut off by the detector or by a conversion."""
    if not np.isfinite(greys).all():
        yield f"{np.mean(~np.isfinite(greys)):.1%} of the sample is not a finite number"
    if greys.size == 0 or not np.issubdtype(greys.dtype, np.integer):
        return
    for grey, where in ((greys.min(), "darkest"), (greys.max(), "brightest")):
        share = float(np.mean(greys == grey))
        if share > SATURATED:
            yield f"saturated greys: {share:.1%} of the sample has the {where} grey, {grey}"


def _noise_problems(levels: dict[int, float], width: float) -> Iterator[str]:
    """Sections recorded with another dwell time. width: of the greys; a difference below 2 % of it says nothing."""
    values = np.array(list(levels.values()))
    if len(values) < FEWEST_LEVELS:
        return
    middle = float(np.median(values))
    odd = [k for k in uneven_sections(values) if abs(values[k] - middle) > OF_WIDTH * width]
    if odd:
        seen = values[odd]
        yield (
            f"noise is uneven: {seen.min():.3g} to {seen.max():.3g} greys in sections "
            f"{ranges([list(levels)[k] for k in odd])}, {middle:.3g} in the median of the sample"
        )


def ranges(numbers: list[int]) -> str:
    """Sorted numbers, runs of neighbours joined: 3, 7-9."""
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in _runs(numbers))


def _runs(numbers: list[int]) -> list[list[int]]:
    """Sorted numbers, cut where one is missing."""
    return [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
