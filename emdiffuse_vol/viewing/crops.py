"""An output at full resolution, a crop at a time: the mean, its uncertainty, and the input that lies there.

Convention: boxes and points are voxels z y x of the stored array, which begins at ``job.region``; greys and
uncertainties are in grey levels. A volume of any size costs no more than the crops asked for.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import GeometryError, InputError
from emdiffuse_vol.geometry.axial import AxialGrid, SectionGrid
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.metrics.interpolation import linear_at
from emdiffuse_vol.modes.mode import coarser
from emdiffuse_vol.reconstruct.job import Job
from emdiffuse_vol.reconstruct.ledger import Ledger
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.reliability import predicted, unit_of
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.sections import without_sections
from emdiffuse_vol.stores.volume import Nanometres, Volume, read_mirrored

Greys = NDArray[Any]


@dataclass(frozen=True)
class Shown:
    """An output of ours. Raises OutputError where there is none."""

    path: Path

    @cached_property
    def output(self) -> Output:
        return Output(self.path)

    @cached_property
    def made(self) -> dict[str, Any]:
        """The output's own account of itself."""
        return self.output.attributes

    @cached_property
    def job(self) -> Job:
        return self.output.job()

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.path, "", self.job.plan.grid)

    @cached_property
    def mean_volume(self) -> Volume:
        return open_volume(self.path, channel=0)

    @cached_property
    def codes_volume(self) -> Volume:
        return open_volume(self.path, channel=int(self.made["uncertainty"]["channel"]))

    @property
    def shape(self) -> Triple:
        return self.job.plan.region.shape

    @property
    def voxel_size(self) -> Nanometres:
        return self.mean_volume.spec.voxel_size

    @property
    def unit(self) -> float:
        """Grey levels from 0 to 1 of the scale that thresholds are given on."""
        return unit_of(self.job, self.mean_volume.spec.dtype)

    @cached_property
    def axial(self) -> AxialGrid | SectionGrid:
        axial: AxialGrid | SectionGrid = self.job.plan.mode.axial
        return axial

    def mean(self, box: Box) -> Greys:
        return self.mean_volume.read(box)

    def uncertainty(self, box: Box) -> NDArray[np.float32]:
        return self.codes_volume.read(box).astype(np.float32) * np.float32(self.made["uncertainty"]["step"])

    def planes(self, box: Box) -> NDArray[np.int64]:
        """Numbers on the axial grid of the planes of a box."""
        return np.arange(box.start[0], box.stop[0]) + self.job.plan.region.start[0]

    def written(self) -> NDArray[np.bool_]:
        """Which blocks hold predictions, on their grid."""
        return predicted(self.ledger)

    def block_box(self, index: int) -> Box:
        return self.job.plan.write_box(index).shift(self.job.plan.offset)


def open_input(shown: Shown, path: str | None) -> Volume:
    """The input of the run, from ``path`` if it has moved. Raises InputError."""
    job = shown.job
    volume = open_volume(path or job.input, **(job.input_options if path is None else _moved(job)))
    if volume.spec.shape != job.input_shape:
        raise InputError(
            f"{volume.url} has shape {volume.spec.shape}, the input of {shown.path.name} had {job.input_shape}; "
            "give that volume"
        )
    return without_sections(volume, job.damaged)


def _moved(job: Job) -> dict[str, Any]:
    """How to open the input somewhere else, whatever that says of its voxel size."""
    z, y, x = job.input_identity["voxel_size"]
    return {**job.input_options, "voxel_size": (z, y, x)}


def open_truth(shown: Shown, path: str) -> Volume:
    """A volume on the grid of the output. Raises InputError."""
    truth = open_volume(path, voxel_size=shown.voxel_size)
    ours, true = shown.shape, truth.spec.shape
    if true[1:] != ours[1:] or true[0] < ours[0]:
        raise InputError(
            f"{path} has shape {true}, {shown.path.name} has {ours}; expected the same y and x, and no fewer planes"
        )
    return truth


def before(shown: Shown, sections: Volume, box: Box) -> tuple[Greys, NDArray[np.float32]]:
    """-> the nearest section of every voxel, and linear interpolation of the sections on both sides; of pixels that are
    finer than the input's, those they lie in. ``sections``: of :func:`open_input`."""
    below, t = shown.axial.locate(shown.planes(box))
    first, last = int(below.min()), int(below.max()) + 2
    plan = shown.job.plan
    moved, lateral = box.shift((0, *plan.region.start[1:])), plan.mode.lateral
    under = coarser(moved, lateral)
    coarse = read_mirrored(sections, Box((first, *under.start[1:]), (last, *under.stop[1:])))
    y, x = (
        np.arange(a, b) // lateral - c for a, b, c in zip(moved.start[1:], moved.stop[1:], under.start[1:], strict=True)
    )
    greys = coarse[:, y[:, None], x]
    return greys[below - first + (t >= 0.5)], linear_at(greys, below - first, t)


def choose_point(shown: Shown, at: Triple | None = None) -> Triple:
    """``at``, or the middle of the volume; where that is not made, of the block nearest to it that is. Of planes near
    there, one as far as can be from any section. Raises GeometryError where ``at`` is outside."""
    shape = shown.shape
    if at is not None:
        if not all(0 <= i < n for i, n in zip(at, shape, strict=True)):
            raise GeometryError(f"voxel {at} is outside the volume of {shape}; give --at Z,Y,X within it")
        return at
    written, block = shown.written(), shown.job.plan.block
    z, y, x = (n // 2 for n in shape)
    middle = z // block[0], y // block[1], x // block[2]
    if not written[middle] and written.any():
        places = np.argwhere(written)
        nearest = places[np.abs((places - middle) * block).sum(axis=1).argmin()]
        box = shown.block_box(int(np.ravel_multi_index(tuple(nearest), shown.ledger.grid)))
        z, y, x = ((a + b) // 2 for a, b in zip(box.start, box.stop, strict=True))
    return _between(shown, z), y, x


def _between(shown: Shown, z: int) -> int:
    """The plane near z that is furthest from its sections."""
    reach = int(shown.axial.factor) // 2 + 1
    near = np.arange(max(0, z - reach), min(shown.shape[0], z + reach + 1))
    _, t = shown.axial.locate(near + shown.job.plan.region.start[0])
    return int(near[np.minimum(t, 1 - t).argmax()])


def slab(point: Triple, shape: Triple, axis: int, size: int) -> Box:
    """A plane through a point, one voxel thick along ``axis``: at most ``size`` voxels wide, as centred as can be."""
    spans = []
    for i, (p, n) in enumerate(zip(point, shape, strict=True)):
        if i == axis:
            spans.append((p, p + 1))
        else:
            start = min(max(0, p - size // 2), max(0, n - size))
            spans.append((start, min(start + size, n)))
    (a, d), (b, e), (c, f) = spans
    return Box((a, b, c), (d, e, f))


def sampled_uncertainty(shown: Shown, boxes: int = 24, edge: int = 64) -> NDArray[np.float32]:
    """Uncertainties of predicted voxels in a chunk from the middle of some of the blocks that are made, evenly spread:
    at most 24 x 64^3 of them, whatever the volume."""
    made = np.flatnonzero(shown.written().ravel())
    if len(made) > boxes:
        made = made[np.linspace(0, len(made) - 1, boxes).round().astype(int)]
    found = [np.zeros(0, np.float32)]
    for index in made:
        whole = shown.block_box(int(index))
        start = tuple(a + n // 2 // edge * edge for a, n in zip(whole.start, whole.shape, strict=True))
        box = Box(start, tuple(a + edge for a in start)) & whole  # type: ignore[arg-type]
        predicted = ~shown.axial.copied(shown.planes(box))
        found.append(shown.uncertainty(box)[predicted].ravel())
    return np.concatenate(found)


def made_at(shown: Shown, most: int = 4096) -> NDArray[np.float64]:
    """When some of the blocks were made, evenly spread over them: seconds since 1970, from the last of their files.
    Blocks without a file, which are black, are left out."""
    made = np.flatnonzero(shown.written().ravel())
    if len(made) > most:
        made = made[np.linspace(0, len(made) - 1, most).round().astype(int)]
    times = []
    for index in map(int, made):
        last = (stop - 1 for stop in shown.block_box(index).stop)
        key = "/".join(str(i // s) for i, s in zip(last, shown.job.plan.shard, strict=True))
        with suppress(OSError):
            times.append((shown.path / "0" / "c" / "0" / key).stat().st_mtime)
    return np.array(times)
