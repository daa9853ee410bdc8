"""Any volume to a sharded OME-Zarr 0.5 with its pyramid.

Convention: the output is written beside its place, under a hidden name, and renamed when it is whole: what has the
output's name is never half-made. Every shard is written once. Memory is bounded by ``BAND_BYTES`` and a few shards,
whatever the volume's size.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emdiffuse_vol.errors import OutputError
from emdiffuse_vol.geometry.boxes import Box, Triple, ceil_div, cell_box, cells_meeting, grid_shape
from emdiffuse_vol.stores.image import coarsen, create_image, finish, open_array, stored_unit, write_units
from emdiffuse_vol.stores.kvstore import is_remote
from emdiffuse_vol.stores.pyramid import pyramid_shapes
from emdiffuse_vol.stores.volume import Volume

CHUNK: Triple = (64, 64, 64)
SHARD_EDGE = 256

# Read at once: neighbouring shards along x, since strips of a TIFF span the width and are decoded whole.
BAND_BYTES = 256 << 20


def convert(
    volume: Volume,
    out: str | os.PathLike[str],
    *,
    chunk: Triple = CHUNK,
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Copy a volume to an OME-Zarr at ``out``, a local path. progress: called with shards done and in all.

    overwrite: replace a Zarr that is there. provenance: JSON values kept in the output, under "emdvol". Raises
    OutputError, GeometryError, or InputError when reading fails; then nothing is left.
    """
    place = check_place(out, overwrite)
    fresh = place.with_name(f".{place.name}.partial")
    try:
        shutil.rmtree(fresh, ignore_errors=True)  # of a conversion that was killed
        place.parent.mkdir(parents=True, exist_ok=True)
        _fill(volume, fresh, place.stem, chunk, provenance or {}, progress)
        swap(fresh, place)
    except OSError as error:
        raise OutputError(f"{place} cannot be written: {error.strerror or error}; choose another place") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_place(out: str | os.PathLike[str], overwrite: bool) -> Path:
    if is_remote(os.fspath(out)):
        raise OutputError(f"{out} is a URL, expected a local path; convert here and copy the result there")
    place = Path(os.path.abspath(out))
    if not os.path.lexists(place):
        return place
    if not overwrite:
        raise OutputError(f"{place} exists; choose another place or give --overwrite")
    if not any((place / key).is_file() for key in ("zarr.json", ".zgroup", ".zarray")):
        raise OutputError(f"{place} exists and is not a Zarr, so it is not overwritten; choose another place")
    return place


def shard_for(shape: Triple, chunk: Triple) -> Triple:
    """Shards of about 256 voxels a side, in whole chunks, no larger than the volume needs."""
    z, y, x = (c * min(max(1, SHARD_EDGE // c), ceil_div(n, c)) for n, c in zip(shape, chunk, strict=True))
    return z, y, x


def _fill(
    volume: Volume,
    path: Path,
    name: str,
    chunk: Triple,
    provenance: dict[str, Any],
    progress: Callable[[int, int], None],
) -> None:
    spec = volume.spec
    shapes = pyramid_shapes(spec.shape)
    shard = shard_for(spec.shape, chunk)
    create_image(
        str(path),
        shape=spec.shape,
        dtype=spec.dtype,
        voxel_size=spec.voxel_size,
        origin=spec.origin,
        chunk=chunk,
        shard=shard,
        levels=len(shapes),
        name=name,
        attributes={"emdvol": provenance | {"source": spec.identity}},
    )
    total = sum(z * y * x for z, y, x in (grid_shape(shape, shard) for shape in shapes))
    progress(0, total)
    done = 0
    for level, shape in enumerate(shapes):
        for _ in _copy(volume, path) if level == 0 else _coarser(path, level, shape):
            done += 1
            progress(done, total)


def _copy(volume: Volume, path: Path) -> Iterator[None]:
    """Level 0, a band of shards at a time; the last shard of a band is written while the next band is read."""
    array = open_array(str(path), 0, "w")
    unit, spec = stored_unit(array), volume.spec
    itemsize = array.dtype.numpy_dtype.itemsize
    width = max(1, BAND_BYTES // (unit[0] * unit[1] * unit[2] * itemsize)) * unit[2]
    whole, pending = Box.of(spec.shape), None
    for index in cells_meeting(whole, (unit[0], unit[1], width)):
        band = cell_box(index, (unit[0], unit[1], width)) & whole
        greys = volume.read(band)
        for cell in cells_meeting(band, unit):
            box = cell_box(cell, unit) & whole
            finish(pending)
            pending = write_units(array, box, greys[box.slices(band.start)])
            yield
    finish(pending)


def _coarser(path: Path, level: int, shape: Triple) -> Iterator[None]:
    # Every finer voxel is read once, in whole chunks: a cache would only hold what nobody asks for again.
    fine = open_array(str(path), level - 1, cache_bytes=1 << 20)
    array = open_array(str(path), level, "w")
    unit, whole, pending = stored_unit(array), Box.of(shape), None
    for cell in cells_meeting(whole, unit):
        box = cell_box(cell, unit) & whole
        greys = coarsen(fine, box)
        finish(pending)
        pending = write_units(array, box, greys)
        yield
    finish(pending)


def swap(fresh: Path, place: Path) -> None:
    """Give the finished output its name; an old one leaves only then."""
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    fresh.rename(place)
    shutil.rmtree(old, ignore_errors=True)
