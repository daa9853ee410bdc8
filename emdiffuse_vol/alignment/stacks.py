"""One stack whose sections have drifted: each brought onto the one before, as ``registration.drift`` allows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from emdiffuse_vol.alignment.stored import Kept, Plane, Progress, Section, make
from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.registration.drift import corrections
from emdiffuse_vol.registration.features import Features, find_features, fit_points
from emdiffuse_vol.registration.pairs import LIMITS, STIFF, Settings, overview, overview_step
from emdiffuse_vol.registration.warps import Matrix, covered, pixel_scale
from emdiffuse_vol.stores.volume import Volume

WINDOW = 50.0  # sections
SAME = 1 / 4  # of the distance of sections: pixels of this size are compared


@dataclass(frozen=True)
class Step:
    """From the last good section to this one."""

    matrix: Matrix
    measures: dict[str, float]
    failures: list[str]


def align_stack(
    volume: Volume,
    out: str | os.PathLike[str],
    transform: str = "rigid",
    window: float = WINDOW,
    *,
    skip_failed: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """-> records of the sections. window: see ``registration.drift``. A section that cannot be matched to the last
    good one is refused, or left empty with ``skip_failed``. Raises ConfigError, InputError, OutputError."""
    Settings(transform).check()
    if not (isfinite(window) and window > 0):
        raise ConfigError(f"window is {window:g} sections; it must be above 0")

    def sections(kept: Kept) -> Iterator[Section]:
        steps = list(find_steps(volume, transform, progress))
        shape = volume.spec.shape[1:]
        matrices = corrections([step.matrix for step in steps], window, shape)
        for k in range(len(kept.records), len(steps)):
            failures = steps[k].failures
            cells = None if failures else covered(matrices[k], shape, shape).astype(np.float32)
            yield Section(matrices[k], steps[k].measures, failures, None, cells)

    said = {"stack": True, "transform": transform, "window": window}
    what = f"{volume.url} cannot be aligned"
    return make(
        volume, volume.spec, sections, out, said, what, skip_failed=skip_failed, overwrite=overwrite, progress=progress
    )


def find_steps(volume: Volume, transform: str, progress: Progress) -> Iterator[Step]:
    last: Features | None = None
    count = volume.spec.shape[0]
    # What is much finer than the distance of two sections is not the same on both.
    thickness, height, width = volume.spec.voxel_size
    common = round(SAME * 2 * thickness / (height + width))
    for z in range(count):
        plane = Plane(volume, z)
        step = max(overview_step(plane), common)
        found = find_features(overview(plane, step))
        if last is None:
            last = found
            yield Step(np.eye(3), {}, [])
        else:
            made = _step(last, found, transform, step)
            if not made.failures:
                last = found
            yield made
        progress(z + 1, count)


def _step(last: Features, found: Features, transform: str, step: int) -> Step:
    least, meaning = LIMITS["agreeing"]
    fit = fit_points(last, found, transform, max(2.0, STIFF / step))
    measures: dict[str, float] = {"matched": fit.matched, "agreeing": fit.agreeing}
    if fit.agreeing < least:
        return Step(np.eye(3), measures, [f"agreeing {fit.agreeing}, at least {least} needed ({meaning})"])
    grow = pixel_scale(step)
    return Step(grow @ fit.matrix @ np.linalg.inv(grow), measures, [])
