"""Two volumes of the same tissue, section upon section: a moving one in the frame of a fixed one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from emdiffuse_vol.alignment.stored import Kept, Plane, Progress, Section, make
from emdiffuse_vol.errors import GeometryError
from emdiffuse_vol.registration.pairs import Binned, Settings, register
from emdiffuse_vol.registration.warps import STRIDE, in_pixels
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.volume import Nanometres, Volume, VolumeSpec


def open_pair_to_register(
    moving: str, fixed: str, voxel_size: Nanometres | None = None, factor: int | None = None
) -> tuple[Volume, Volume, int]:
    """-> moving, fixed, and how many pixels of the fixed one are as long as one of the moving.

    voxel_size: of the fixed volume, where it does not say. factor: where the volumes do not say. Raises InputError and
    GeometryError.
    """
    target = open_volume(fixed, voxel_size=voxel_size)
    z, y, x = target.spec.voxel_size
    if factor is not None:
        size: Nanometres | None = (z, y * factor, x * factor)
    else:
        size = voxel_size
    source = open_volume(moving, voxel_size=size)
    ratio = source.spec.voxel_size[1] / y
    if factor is None:
        factor = max(1, round(ratio))
    if abs(ratio / factor - 1) > 0.1:
        raise GeometryError(
            f"a pixel of {moving} is {ratio:.3g} pixels of {fixed}, expected a whole number; register the finer one "
            "as FIXED, or correct the sizes with --voxel-size and --factor"
        )
    if source.spec.shape[0] != target.spec.shape[0]:
        raise GeometryError(
            f"{moving} has {source.spec.shape[0]} sections and {fixed} has {target.spec.shape[0]}; expected the same"
        )
    return source, target, factor


def register_pair(
    moving: Volume,
    fixed: Volume,
    factor: int,
    out: str | os.PathLike[str],
    settings: Settings,
    *,
    skip_failed: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """-> records of the sections. Raises ConfigError, WeightsError, InputError, OutputError."""
    settings.check()
    flow = settings.load_flow()

    def sections(kept: Kept) -> Iterator[Section]:
        for z in range(len(kept.records), fixed.spec.shape[0]):
            found = register(reference(fixed, z, factor), Plane(moving, z), settings, flow)
            if failures := found.failures:
                yield Section(np.eye(3), found.measures, failures)
            else:
                yield Section(found.warp.matrix, found.measures, [], found.warp.bend, found.confidence)

    said = {**asdict(settings), "factor": factor, "fixed": fixed.spec.identity}
    what = f"{moving.url} cannot be registered to {fixed.url}"
    return make(
        moving,
        frame_of(moving, fixed, factor),
        sections,
        out,
        said,
        what,
        skip_failed=skip_failed,
        overwrite=overwrite,
        progress=progress,
    )


def reference(fixed: Volume, z: int, factor: int) -> Plane | Binned:
    """A section of the fixed volume at the moving one's pixels."""
    plane = Plane(fixed, z)
    return plane if factor == 1 else Binned(plane, factor)


def frame_of(moving: Volume, fixed: Volume, factor: int) -> VolumeSpec:
    """The fixed volume's place with the moving one's greys and pixels: centres of coarse pixels lie between fine
    ones."""
    (depth, height, width), (z, y, x) = fixed.spec.shape, fixed.spec.voxel_size
    first, top, left = fixed.spec.origin
    return replace(
        moving.spec,
        shape=(depth, height // factor, width // factor),
        voxel_size=(z, y * factor, x * factor),
        origin=(first, top + (factor - 1) / 2 * y, left + (factor - 1) / 2 * x),
        chunk=None,
    )


def read_registered(
    out: str | os.PathLike[str], moving: Volume, fixed: Volume, factor: int, z: int, side: int
) -> tuple[Any, Any, Any, Any, Any]:
    """The middle of a section, at most ``side`` pixels: fixed, moving as it was, moving as it is [y, x], flow
    [2, y, x] and confidence [y, x], for pictures."""
    after = Plane(open_volume(out), z)
    size = [min(n, side) for n in after.shape]
    start = [(n - s) // 2 // STRIDE * STRIDE for n, s in zip(after.shape, size, strict=True)]
    window = tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))
    cells = tuple(slice(w.start // STRIDE, -(-w.stop // STRIDE)) for w in window)
    before = np.zeros(size, moving.spec.dtype)
    greys = Plane(moving, z)[window[0], window[1]]
    before[: greys.shape[0], : greys.shape[1]] = greys
    names = [("flow", 0), ("flow", 1), ("confidence", None)]
    parts = [Plane(open_volume(f"{out}/{name}", channel=channel), z)[cells[0], cells[1]] for name, channel in names]
    y, x, confidence = (in_pixels(part)[: size[0], : size[1]] for part in parts)
    shown = reference(fixed, z, factor)[window[0], window[1]], before, after[window[0], window[1]]
    return *shown, np.stack([y, x]), confidence / 255
