"""Any volume to a sharded OME-Zarr 0.5 with its pyramid.

Convention: the output is written beside its place, under a hidden name, and renamed when it is whole: what has the
output's name is never half-made. Every shard is written once. A copy that was killed goes on where it was; one that
fails leaves nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorstore as ts

from emdiffuse_vol.errors import OutputError
from emdiffuse_vol.geometry.boxes import Triple, ceil_div
from emdiffuse_vol.stores.copying import Journal, Target, Write, fill, remove
from emdiffuse_vol.stores.image import create_image, open_array, stored_unit, write_units
from emdiffuse_vol.stores.kvstore import is_remote
from emdiffuse_vol.stores.pyramid import pyramid_shapes
from emdiffuse_vol.stores.spec import digest_of
from emdiffuse_vol.stores.volume import Volume

CHUNK: Triple = (64, 64, 64)
SHARD_EDGE = 256
ZARR_KEYS = ("zarr.json", ".zgroup", ".zarray")

Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    pass


def convert(
    volume: Volume,
    out: str | os.PathLike[str],
    *,
    chunk: Triple = CHUNK,
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> None:
    """Copy a volume to an OME-Zarr at ``out``, a local path. progress: called with shards done and in all.

    overwrite: replace a Zarr that is there. provenance: JSON values kept in the output, under "emdvol". Raises
    OutputError, GeometryError, or InputError when reading fails; then nothing is left.
    """
    place = check_place(out, overwrite)
    spec = volume.spec
    attributes = {"emdvol": (provenance or {}) | {"source": spec.identity}}

    def make(path: Path, begun: bool) -> Target:
        shapes = pyramid_shapes(spec.shape)
        if not begun:
            create_image(
                str(path),
                shape=spec.shape,
                dtype=spec.dtype,
                voxel_size=spec.voxel_size,
                origin=spec.origin,
                chunk=chunk,
                shard=shard_for(spec.shape, chunk),
                levels=len(shapes),
                name=place.stem,
                attributes=attributes,
            )
        return _Image(path, shapes)

    build(volume, place, make, digest_of([attributes, volume.url, list(chunk), place.name]), progress)


@dataclass(frozen=True)
class _Image:
    path: Path
    shapes: list[Triple]

    def unit(self, level: int) -> Triple:
        return stored_unit(open_array(str(self.path), level, "w"))

    def writer(self, level: int) -> Write:
        array = open_array(str(self.path), level, "w")
        return lambda box, greys: write_units(array, box, greys)

    def reader(self, level: int) -> ts.TensorStore:
        # Every finer voxel is read once, in whole chunks: a cache would only hold what nobody asks for again.
        return open_array(str(self.path), level, cache_bytes=1 << 20)

    def close(self) -> None:
        pass


def build(
    volume: Volume,
    place: Path,
    make: Callable[[Path, bool], Target],
    key: str | None,
    progress: Progress,
) -> None:
    """Fill a target under a hidden name and give it its own. make: (path, whether it was begun) -> the target there.

    key: a target in a folder that was begun under the same key is gone on with; None for one that cannot be.
    """
    fresh = place.with_name(f".{place.name}.partial")
    try:
        if key is None:
            remove(fresh)
        journal = Journal(None, "", []) if key is None else Journal.open(fresh, key)
        place.parent.mkdir(parents=True, exist_ok=True)
        target = make(fresh, journal.begun)
        journal.begin(len(target.shapes))
        try:
            fill(volume, target, journal, progress)
        finally:
            target.close()
        journal.end()
        swap(fresh, place)
    except Exception as error:  # an interrupted copy is left, to be gone on with
        remove(fresh)
        if isinstance(error, OSError):
            raise OutputError(f"{place} cannot be written: {error.strerror or error}; choose another place") from error
        raise


def check_place(out: str | os.PathLike[str], overwrite: bool) -> Path:
    place = check_local(out, overwrite)
    if os.path.lexists(place) and not any((place / key).is_file() for key in ZARR_KEYS):
        raise OutputError(f"{place} exists and is not a Zarr, so it is not overwritten; choose another place")
    return place


def check_local(out: str | os.PathLike[str], overwrite: bool) -> Path:
    """Raises OutputError for a URL, and for what exists without ``overwrite``."""
    if is_remote(os.fspath(out)):
        raise OutputError(f"{out} is a URL, expected a local path; convert here and copy the result there")
    place = Path(os.path.abspath(out))
    if os.path.lexists(place) and not overwrite:
        raise OutputError(f"{place} exists; choose another place or give --overwrite")
    return place


def shard_for(shape: Triple, chunk: Triple) -> Triple:
    """Shards of about 256 voxels a side, in whole chunks, no larger than the volume needs."""
    z, y, x = (c * min(max(1, SHARD_EDGE // c), ceil_div(n, c)) for n, c in zip(shape, chunk, strict=True))
    return z, y, x


def swap(fresh: Path, place: Path) -> None:
    """Give the finished output its name; an old one leaves only then."""
    old = place.with_name(f".{place.name}.old")
    remove(old)
    if place.exists():
        place.rename(old)
    fresh.rename(place)
    remove(old)
