"""Registered pairs and aligned stacks on disk, section by section.

    pair.zarr              OME-Zarr: the moving volume in the frame of the fixed one; 0 where it has nothing
    pair.zarr/confidence   OME-Zarr, uint8, 255 for 1: of cells of 8 x 8 pixels; 0 where the moving volume has nothing
    pair.zarr/flow         OME-Zarr, float32, channels y and x: displacement of the same cells, in pixels
    pair.zarr/sections.jsonl   of each section: matrix, what was measured, and why it failed, if it did

Convention: a place p of the output shows what lies at ``matrix(p + flow(p))`` in the moving section (``registration.
warps``). Everything is made in a hidden folder beside the output and given its name when it is whole; what was killed
goes on with the section it was at. Memory is that of a few tiles, and of the cells of one section.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol import __version__
from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box, cell_box, cells_meeting
from emdiffuse_vol.registration.warps import STRIDE, Floats, Matrix, Warp, cell_shape, places_of, sample
from emdiffuse_vol.stores.convert import check_place, convert, swap
from emdiffuse_vol.stores.copying import remove
from emdiffuse_vol.stores.image import create_image, finish, open_array, write_units
from emdiffuse_vol.stores.spec import digest_of
from emdiffuse_vol.stores.volume import Volume, VolumeSpec

PIECE = 1024  # pixels along y and x warped at a time
CELLS = 512  # along a chunk of what is kept of cells

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plane:
    """A section of a volume, as an ``Image``."""

    volume: Volume
    z: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.volume.spec.shape[1:]

    def __getitem__(self, window: tuple[slice, slice]) -> NDArray[Any]:
        (top, bottom), (left, right) = (s.indices(n)[:2] for s, n in zip(window, self.shape, strict=True))
        greys: NDArray[Any] = self.volume.read(Box((self.z, top, left), (self.z + 1, bottom, right)))[0]
        return greys


@dataclass(frozen=True)
class Section:
    """What is kept of a section: bend [2, cells_y, cells_x] and confidence [cells_y, cells_x] from 0 to 1, None where
    they are 0. failures: why it is left empty."""

    matrix: Matrix
    measures: dict[str, float]
    failures: list[str]
    bend: Floats | None = None
    confidence: Floats | None = None


@dataclass(frozen=True)
class Warped:
    """The moving volume in the frame of ``spec``. warp: of a section, None for one that is left empty."""

    moving: Volume
    spec: VolumeSpec
    warp: Callable[[int], Warp | None]

    @property
    def url(self) -> str:
        return self.moving.url

    @property
    def options(self) -> dict[str, Any]:
        return self.moving.options

    def read(self, box: Box) -> NDArray[Any]:
        out = np.zeros(box.shape, self.spec.dtype)
        for cell in cells_meeting(box, (1, PIECE, PIECE)):
            piece = cell_box(cell, (1, PIECE, PIECE)) & box
            z, *start = piece.start
            if warp := self.warp(z):
                places = warp(places_of(piece.shape[1:], (start[0], start[1])))
                greys, there = sample(Plane(self.moving, z), places)
                out[piece.slices(box.start)][0] = stored(np.where(there, greys, 0), out.dtype)
        return out


def stored(greys: Floats, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rounded and clipped where the dtype is of whole numbers."""
    if dtype.kind == "f":
        return greys.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(greys), limits.min, limits.max).astype(dtype)


class Kept:
    """The hidden folder of an output in the making. key: tells what is made; what another one began is removed."""

    def __init__(self, place: Path, spec: VolumeSpec, key: str) -> None:
        self.place, self.spec = place, spec
        self.folder = place.with_name(f".{place.name}.registering")
        self.log = self.folder / "sections.jsonl"
        self.records: list[dict[str, Any]] = []
        try:
            first, *rest = self.log.read_text().splitlines(keepends=True)
            if json.loads(first)["key"] == key:
                self.records = [json.loads(line) for line in rest if line.endswith("\n")]
                self._rewrite(key)
                return
        except (OSError, ValueError, LookupError):
            pass
        remove(self.folder)
        self._create("confidence", "uint8", "zyx")
        self._create("flow", "float32", "czyx")
        self._rewrite(key)

    def _create(self, name: str, dtype: str, axes: Any) -> None:
        spec, extra = self.spec, [2] * (len(axes) - 3)
        (z, y, x), (first, top, left) = spec.voxel_size, spec.origin
        middle = (STRIDE - 1) / 2
        cells = cell_shape(spec.shape[1:])
        create_image(
            str(self.folder / name),
            shape=[*extra, spec.shape[0], *cells],
            dtype=dtype,
            voxel_size=(z, y * STRIDE, x * STRIDE),
            origin=(first, top + middle * y, left + middle * x),
            axes=axes,
            chunk=[*extra, 1, *(min(CELLS, n) for n in cells)],
            name=name,
            attributes={"emdvol": {"pixels_per_cell": STRIDE}},
        )

    def _rewrite(self, key: str) -> None:
        """Without a last line that a kill has cut short."""
        lines = [json.dumps({"key": key}), *map(json.dumps, self.records)]
        beside = self.log.with_suffix(".new")
        beside.write_text("".join(line + "\n" for line in lines))
        beside.replace(self.log)

    def add(self, section: Section) -> None:
        """On disk when it returns."""
        k, cells = len(self.records), cell_shape(self.spec.shape[1:])
        box = Box((k, 0, 0), (k + 1, *cells))
        codes = None if section.confidence is None else np.rint(section.confidence * 255).astype(np.uint8)
        for name, values in (("flow", section.bend), ("confidence", codes)):
            if values is not None:
                array = open_array(str(self.folder / name), 0, "w")
                finish(write_units(array, box, np.ascontiguousarray(values[..., None, :, :])))
        record = {
            "section": k,
            "matrix": section.matrix.tolist(),
            "measures": {name: round(float(value), 4) for name, value in section.measures.items()},
            "failures": section.failures,
        }
        self.records.append(record)
        with self.log.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def warp(self, z: int) -> Warp | None:
        record = self.records[z]
        if record["failures"]:
            return None
        bend = open_array(str(self.folder / "flow"), cache_bytes=0)[:, z].read().result()
        return Warp(np.array(record["matrix"], float), bend)


def make(
    moving: Volume,
    spec: VolumeSpec,
    sections: Callable[[Kept], Iterable[Section]],
    out: str | os.PathLike[str],
    settings: dict[str, Any],
    what: str,
    *,
    skip_failed: bool,
    overwrite: bool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The output at ``out``, with the frame and voxels of ``spec``. -> its records, of which those are said in the
    module. sections: what is left to do of ``len(kept.records)`` on. what: for messages, "A cannot be registered to B".

    Raises OutputError, and InputError where sections have failed that were not to be skipped, or all have; then nothing
    is left.
    """
    place = check_place(out, overwrite)
    kept = Kept(place, spec, digest_of([settings, spec.identity, moving.spec.identity]))
    progress(len(kept.records), spec.shape[0])
    try:
        for section in sections(kept):
            kept.add(section)
            progress(len(kept.records), spec.shape[0])
        _judge(kept.records, what, skip_failed)
    except Exception:  # a kill leaves what it has made, to be gone on with
        remove(kept.folder)
        raise
    image = kept.folder / "image"
    if not image.exists():
        software = {"emdiffuse_vol": __version__}
        provenance = {"software": software, "registration": settings, "registered": _summary(kept.records)}
        warped = Warped(moving, spec, lru_cache(4)(kept.warp))
        convert(warped, image, chunk=(min(64, spec.shape[0]), 64, 64), provenance=provenance)
    for name in ("flow", "confidence", "sections.jsonl"):
        if (kept.folder / name).exists():
            (kept.folder / name).rename(image / name)
    swap(image, place)
    remove(kept.folder)
    return kept.records


def _judge(records: list[dict[str, Any]], what: str, skip_failed: bool) -> None:
    failed = [record for record in records if record["failures"]]
    if not failed or (skip_failed and len(failed) < len(records)):
        return
    said = "; ".join(failed[0]["failures"])
    if len(records) == 1:
        raise InputError(f"{what}: {said}; check that both show the same place")
    raise InputError(
        f"{what}: {len(failed)} of {len(records)} sections failed, the first of them section {failed[0]['section']}: "
        f"{said}; check that both show the same place, or leave failed sections empty with --skip-failed"
    )


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over sections of what was measured, and which sections are empty."""
    good = [record["measures"] for record in records if not record["failures"]]
    names = sorted({name for measures in good for name in measures})
    medians = {name: float(np.median([m[name] for m in good if name in m])) for name in names}
    return {"median": medians, "failed": [record["section"] for record in records if record["failures"]]}
