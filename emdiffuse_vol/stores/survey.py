"""A first look at a volume: its greys and what seems wrong, from a sparse sample.

Convention: the sample is some runs of neighbouring sections, evenly spread over z, and in each run patches at the
centre and at the four quarter points. A section counts as constant when all its patches hold one grey, and as black
when that grey is 0. What is read stays below about a thousand small boxes, whatever the volume's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.volume import Volume, VolumeSpec

PATCH = 64  # voxels along y and x
DEEPEST_RUN = 64  # sections
RUNS, SECTIONS = 16, 256  # at least so many runs, and more where runs are thin, if the volume has them
SATURATED = 0.01


@dataclass(frozen=True)
class Survey:
    """percentiles: 0.5, 50 and 99.5 % of the sampled greys of sections that are not constant. problems: one line each.
    factor: voxel size along z over the mean of y and x."""

    sections: int
    percentiles: tuple[float, float, float]
    constant: tuple[int, ...]
    factor: float
    problems: tuple[str, ...]


def factor_to_isotropy(spec: VolumeSpec) -> float:
    z, y, x = spec.voxel_size
    return z / ((y + x) / 2)


def survey(volume: Volume) -> Survey:
    """Raises InputError where the sample hits damage."""
    constant: dict[int, float] = {}
    samples, sections = [], 0
    for run in sample_runs(volume.spec):
        patches = [volume.read(box) for box in run]
        columns = np.concatenate([patch.reshape(len(patch), -1) for patch in patches], axis=1)
        sections += len(columns)
        flat = columns.min(axis=1) == columns.max(axis=1)
        first = run[0].start[0]
        constant |= {first + int(i): float(columns[i, 0]) for i in np.flatnonzero(flat)}
        samples.append(columns[~flat].ravel())
    greys = np.concatenate(samples)
    finite = greys[np.isfinite(greys)]
    low, middle, high = np.percentile(finite if finite.size else [0], (0.5, 50, 99.5)).tolist()
    return Survey(
        sections=sections,
        percentiles=(low, middle, high),
        constant=tuple(constant),
        factor=factor_to_isotropy(volume.spec),
        problems=(*_geometry_problems(volume.spec), *_section_problems(constant), *_grey_problems(greys)),
    )


def sample_runs(spec: VolumeSpec) -> Iterator[list[Box]]:
    """Boxes of each run, a run at a time; runs start at chunk borders, so that no chunk is decoded for one plane."""
    depth, height, width = spec.shape
    thick = min((spec.chunk or (1, 1, 1))[0], DEEPEST_RUN)
    runs = -(-depth // thick)
    chosen = np.linspace(0, runs - 1, min(runs, max(RUNS, SECTIONS // thick))).round().astype(int).tolist()
    places = ((2, 2), (1, 1), (1, 3), (3, 1), (3, 3))
    corners = dict.fromkeys((_corner(height, i), _corner(width, j)) for i, j in places)
    for run in chosen:
        z = run * thick
        yield [Box((z, y, x), (z + thick, y + PATCH, x + PATCH)) & Box.of(spec.shape) for y, x in corners]


def _corner(size: int, quarters: int) -> int:
    """Start of a patch around a quarter point, inside the section where it fits."""
    return max(0, min(size * quarters // 4 - PATCH // 2, size - PATCH))


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


def ranges(numbers: list[int]) -> str:
    """Sorted numbers, runs of neighbours joined: 3, 7-9."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
