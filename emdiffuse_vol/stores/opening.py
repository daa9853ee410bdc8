"""Opening whatever holds a volume, deciding by looking at it, not at its name.

a URL, or a folder with Zarr metadata   -> OME-Zarr, or a plain 3D Zarr array
a folder with TIFF files                -> one section per file
a TIFF file                             -> one section per page
"""

from __future__ import annotations

import os
from pathlib import Path

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.stores.kvstore import absolute, is_remote
from emdiffuse_vol.stores.ome_zarr import open_zarr
from emdiffuse_vol.stores.phantom import PhantomVolume
from emdiffuse_vol.stores.tiff import is_tiff, open_tiff, section_files
from emdiffuse_vol.stores.volume import Nanometres, Volume

ZARR_KEYS = ("zarr.json", ".zgroup", ".zattrs", ".zarray")


def open_volume(
    url: str | os.PathLike[str],
    *,
    voxel_size: Nanometres | None = None,
    level: int = 0,
    channel: int | None = None,
) -> Volume:
    """Open a volume for reading.

    voxel_size: nm, z y x; overrides what the files say, and is needed where they say nothing. level: of an OME-Zarr.
    channel: index along its channel axis, needed when that has more than one. Raises InputError.
    """
    if os.fspath(url).startswith("phantom:"):
        return PhantomVolume.from_url(os.fspath(url))
    where = absolute(url)
    path = Path(where)
    if is_remote(where) or any((path / key).is_file() for key in ZARR_KEYS):
        return open_zarr(where, voxel_size=voxel_size, level=level, channel=channel)
    if not path.exists():
        raise InputError(f"{where} does not exist; check the path")
    if not (section_files(path) if path.is_dir() else is_tiff(path)):
        kind = "a folder with neither Zarr metadata nor TIFF files" if path.is_dir() else "not a TIFF file"
        raise InputError(f"{where} is {kind}, expected OME-Zarr, a TIFF file or a folder of TIFF sections")
    if level or channel:
        raise InputError(f"{where} is TIFF: it has no level {level} and no channel {channel or 0}; leave them out")
    return open_tiff(path, voxel_size=voxel_size)
