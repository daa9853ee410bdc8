"""What of the output is empty, and with what grey: nothing is predicted there.

Convention: the cells of the tiling are empty or not, each by itself, so what is empty does not depend on blocks or
regions. An empty cell is filled with

    0               outside the mask: the mask, placed in nm, is 0 in all of the cell's box, or does not reach it. In
                    both channels, measured sections too
    the constant    where all voxels that its tile reads are one grey, and that is the smallest or the largest of the
                    dtype, or 0 (float32: 0). The uncertainty is 0

The constant is looked for in a coarse level of the input's pyramid where there is one: the coarsest whose voxels are at
most a quarter of a cell in y and x, with a border of one coarse voxel around what the tile reads. A mean of integers is
their smallest or largest possible only if all of them are, except by rounding: specks in the dark that amount to half
a grey or less of a coarse voxel are lost. A coarse level also holds the damaged sections, which can only make a cell
less empty: then it is predicted like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import count, product
from math import ceil, floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import GeometryError, InputError
from emdiffuse_vol.geometry.boxes import Box, Triple, ceil_div, cell_box, cells_meeting
from emdiffuse_vol.modes.mode import to_input
from emdiffuse_vol.reconstruct.job import Job
from emdiffuse_vol.reconstruct.plan import Block, Plan
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.survey import sample_runs
from emdiffuse_vol.stores.volume import Volume, VolumeSpec, mirror_source

Corner = tuple[float, float, float]
Fills = dict[Triple, float]
SHARE = 4  # coarse voxels along a cell in y and x, at least
RUNS = 16  # places along z where a coarse level is compared with the input
ROUNDING = 1e-6  # of a voxel


@dataclass(frozen=True)
class Overlay:
    """Another volume over the input: a voxel of it is ``step`` input voxels wide, and the centre of its first lies
    ``offset`` input voxels from the centre of the input's first."""

    volume: Volume
    step: Corner
    offset: Corner

    @staticmethod
    def of(volume: Volume, like: VolumeSpec) -> Overlay:
        """By voxel sizes and origins, ``like`` being the input's."""
        spec = volume.spec
        z, y, x = (a / b for a, b in zip(spec.voxel_size, like.voxel_size, strict=True))
        dz, dy, dx = ((a - b) / v for a, b, v in zip(spec.origin, like.origin, like.voxel_size, strict=True))
        return Overlay(volume, (z, y, x), (dz, dy, dx))

    def over(self, start: Corner, stop: Corner, border: int = 0) -> Box:
        """Its voxels that share space with a part of the input, and ``border`` more around; none outside the volume.

        start, stop: corners of the part in input voxels, centres at whole numbers.
        """
        low, high = (
            [(p - o) / s + 0.5 for p, o, s in zip(corner, self.offset, self.step, strict=True)]
            for corner in (start, stop)
        )
        a, b, c = (floor(n + ROUNDING) - border for n in low)
        d, e, f = (ceil(n - ROUNDING) + border for n in high)
        return Box((a, b, c), (d, e, f)) & Box.of(self.volume.spec.shape)


@dataclass(frozen=True)
class Emptiness:
    """Which cells of a run are empty. constants: greys that mean nothing is there. coarse: where they are looked for;
    None: in what a block reads anyway."""

    plan: Plan
    constants: tuple[float, ...] = ()
    coarse: Overlay | None = None
    mask: Overlay | None = None

    def fills(self, block: Block, sections: NDArray[Any] | None = None) -> Fills:
        """Each empty cell of a block, and its grey. sections: greys of ``block.read``; without them, what can be told
        without reading all that."""
        found: Fills = {}
        if self.constants and self.coarse:
            found = _uniform(self._boxes(block, self._coarse_box), self.coarse.volume.read, self.constants)
        elif self.constants and sections is not None:
            greys, start = sections, block.read.start
            found = _uniform(self._boxes(block, self._read_box), lambda box: greys[box.slices(start)], self.constants)
        if self.mask:
            found |= _uniform(self._boxes(block, self._mask_box), self.mask.volume.read, (0,), absent=0)
        return found

    def whole(self, block: Block, sections: NDArray[Any] | None = None) -> float | None:
        """The grey of a block whose cells are all empty with that grey, else None; see :meth:`fills`.

        Such a block is the grey all over in the mean, and 0 in the uncertainty; where both are 0 it need not be
        written, as arrays are 0 where nothing was.
        """
        fills = self.fills(block, sections)
        greys = {fills.get(cell) for cell in cells_meeting(block.write, self.plan.tiling.core)}
        return greys.pop() if len(greys) == 1 else None

    def _boxes(self, block: Block, place: Callable[[Triple], Box]) -> dict[Triple, Box]:
        """Where each cell of a block is looked at. ``place`` treats the axes apart, so it is asked once for each index
        along each, not for each of thousands of cells."""
        core, write = self.plan.tiling.core, block.write
        ranges = [range(a // c, ceil_div(b, c)) for a, b, c in zip(write.start, write.stop, core, strict=True)]
        k, j, i = (indices[0] for indices in ranges)
        z = {n: place((n, j, i)) for n in ranges[0]}
        y = {n: place((k, n, i)) for n in ranges[1]}
        x = {n: place((k, j, n)) for n in ranges[2]}
        return {
            (k, j, i): Box((z[k].start[0], y[j].start[1], x[i].start[2]), (z[k].stop[0], y[j].stop[1], x[i].stop[2]))
            for k, j, i in product(*ranges)
        }

    def _read_box(self, cell: Triple) -> Box:
        """Good sections that the tile of a cell reads, mirrored ones too: as in what a block reads."""
        return self.plan.mode.read_box(self.plan.tiling.input_box(cell))

    def _coarse_box(self, cell: Triple) -> Box:
        assert self.coarse is not None
        mode = self.plan.mode
        source = mirror_source(self._read_box(cell), mode.stack_shape)
        good = mode.axial.good
        start = (int(good[source.start[0]]), *source.start[1:])
        stop = (int(good[source.stop[0] - 1]) + 1, *source.stop[1:])
        return self.coarse.over(_edge(start), _edge(stop), border=1)

    def _mask_box(self, cell: Triple) -> Box:
        assert self.mask is not None
        mode = self.plan.mode
        box = cell_box(cell, self.plan.tiling.core) & Box.of(mode.output_shape)
        start, stop = _edge(box.start), _edge(box.stop)
        return self.mask.over(to_input(mode, start), to_input(mode, stop))


def empty_codes(block: Block, grey: float, dtype: str) -> NDArray[Any]:
    """[2, z, y, x] of a block that is wholly empty."""
    codes = np.zeros((2, *block.write.shape), dtype)
    codes[0] = grey
    return codes


def _edge(corner: Triple) -> Corner:
    """Corner of a box of voxels, where the centre of voxel n is at n."""
    z, y, x = corner
    return z - 0.5, y - 0.5, x - 0.5


def _uniform(
    boxes: dict[Triple, Box],
    read: Callable[[Box], NDArray[Any]],
    greys: tuple[float, ...],
    absent: float | None = None,
) -> Fills:
    """Cells whose box is one grey, and that among ``greys``. absent: grey of a box that has no voxels.

    All boxes are read together, once.
    """
    there = {box for box in boxes.values() if not box.empty}
    values, start = np.empty((0, 0, 0)), (0, 0, 0)
    if there:
        whole = reduce(Box.__or__, there)
        values, start = read(whole), whole.start
    told: dict[Box, float | None] = {}  # planes between the same sections look at the same voxels
    found: Fills = {}
    for cell, box in boxes.items():
        if box not in told:
            told[box] = absent if box.empty else _grey(values[box.slices(start)], greys)
        if (grey := told[box]) is not None:
            found[cell] = grey
    return found


def _grey(values: NDArray[Any], greys: tuple[float, ...]) -> float | None:
    first = float(values[0, 0, 0])
    return first if first in greys and bool((values == values[0, 0, 0]).all()) else None


def describe_empty(plan: Plan, volume: Volume, skip: bool, mask: str | None) -> dict[str, Any]:
    """What decides emptiness, as JSON values: the part of a job that :func:`open_emptiness` opens again.

    volume: the input, as given. Raises InputError or GeometryError for a mask that cannot be used.
    """
    coarse = choose_level(volume, plan.tiling.core) if skip else None
    return {
        "constants": list(constants(volume.spec.dtype)) if skip else [],
        "coarse": coarse and {"level": coarse.volume.options["level"], **_placed(coarse)},
        "mask": mask and _describe_mask(mask, volume.spec),
    }


def _describe_mask(path: str, spec: VolumeSpec) -> dict[str, Any]:
    try:
        mask = open_volume(path)
    except InputError as error:
        raise InputError(f"--mask: {error}") from error
    overlay = Overlay.of(mask, spec)
    if overlay.over(_edge((0, 0, 0)), _edge(spec.shape)).empty:
        there, here = mask.spec, spec
        raise GeometryError(
            f"--mask {path} lies beside the input: it begins at {there.origin} nm with voxels of {there.voxel_size}, "
            f"the input at {here.origin} with {here.voxel_size}; correct the voxel size and origin of one"
        )
    return {"path": mask.url, "identity": mask.spec.identity, **_placed(overlay)}


def _placed(overlay: Overlay) -> dict[str, Any]:
    return {"step": list(overlay.step), "offset": list(overlay.offset)}


def open_emptiness(job: Job) -> Emptiness:
    coarse = mask = None
    if found := job.empty["coarse"]:
        # The level's own voxel size may be missing; where it lies is known already.
        volume = open_volume(job.input, **{**job.input_options, "level": found["level"], "voxel_size": (1.0, 1.0, 1.0)})
        coarse = Overlay(volume, tuple(found["step"]), tuple(found["offset"]))
    if found := job.empty["mask"]:
        mask = Overlay(open_volume(found["path"]), tuple(found["step"]), tuple(found["offset"]))
    return Emptiness(job.plan, tuple(job.empty["constants"]), coarse, mask)


def constants(dtype: str) -> tuple[float, ...]:
    """Greys that mean that nothing is there."""
    if dtype == "float32":
        return (0.0,)
    info = np.iinfo(dtype)
    return tuple(sorted({float(info.min), 0.0, float(info.max)}))


def choose_level(volume: Volume, core: Triple) -> Overlay | None:
    """The coarsest level, of those beyond the input's own, whose voxels are at most 1 / SHARE of a cell in y and x.
    None where there is none that can be trusted."""
    if volume.spec.dtype == "int16":
        return None  # noise about 0 would average to 0
    fine = [
        overlay
        for overlay in coarser_levels(volume)
        if all(s * SHARE <= c for s, c in zip(overlay.step[1:], core[1:], strict=True))
    ]
    return next((overlay for overlay in reversed(fine) if agrees(overlay, volume)), None)


def coarser_levels(volume: Volume) -> Iterator[Overlay]:
    """Levels of the same pyramid that cover all of the volume, finest first, as far as they can be opened."""
    options, shape = volume.options, volume.spec.shape
    if "level" not in options:
        return
    # Sizes as the file says, also where the user knows better: what counts is their ratio.
    options = {**options, "voxel_size": None}
    try:
        own = open_volume(volume.url, **options).spec
        for level in count(options["level"] + 1):
            coarse = open_volume(volume.url, **{**options, "level": level})
            overlay = Overlay.of(coarse, own)
            surplus = [s * m - n for s, m, n in zip(overlay.step, coarse.spec.shape, shape, strict=True)]
            whole = all(-1e-3 < more < s + 1e-3 for more, s in zip(surplus, overlay.step, strict=True))
            if not whole or max(overlay.step) < 1.001 or coarse.spec.dtype != own.dtype:
                return
            yield overlay
    except InputError:  # there is no such level, or nothing says how large its voxels are
        return


def agrees(coarse: Overlay, volume: Volume) -> bool:
    """Whether a level is empty nowhere that the volume is not, from a sparse sample: pyramids may be half built."""
    empty = constants(volume.spec.dtype)
    least = 0.0 if volume.spec.dtype == "float32" else 1.0  # what rounding can hide
    runs = list(sample_runs(volume.spec))
    for box in (box for run in runs[:: ceil_div(len(runs), RUNS)] for box in run):
        grey = _grey(coarse.volume.read(coarse.over(_edge(box.start), _edge(box.stop), border=1)), empty)
        if grey is not None and np.abs(volume.read(box).astype(np.float64) - grey).mean() > least:
            return False
    return True
