"""Opening whatever holds a volume, deciding by looking at it, not at its name.

a folder or URL with Zarr metadata      -> OME-Zarr, or a plain 3D Zarr array
a folder or URL with attributes.json    -> N5
a folder or URL with info               -> neuroglancer precomputed
a folder with TIFF files                -> one section per file
a TIFF file                             -> one section per page
an HDF5 file, file.h5:/path             -> one of its datasets
an MRC file
tensorstore:{...}, or a JSON file       -> whatever tensorstore opens by that spec
zarr://, n5://, precomputed:// before a URL, as neuroglancer writes them, are left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.stores.hdf5 import is_hdf5, open_hdf5, split_url
from emdiffuse_vol.stores.kvstore import absolute, is_remote, read_json
from emdiffuse_vol.stores.mrc import is_mrc, open_mrc
from emdiffuse_vol.stores.n5 import open_n5
from emdiffuse_vol.stores.ome_zarr import open_zarr
from emdiffuse_vol.stores.phantom import PhantomVolume
from emdiffuse_vol.stores.png import is_png, open_png
from emdiffuse_vol.stores.precomputed import open_precomputed
from emdiffuse_vol.stores.raw_spec import SCHEME, is_spec_file, open_spec
from emdiffuse_vol.stores.tiff import is_tiff, open_tiff, section_files
from emdiffuse_vol.stores.volume import Nanometres, Volume

# Files that tell what a folder is, in the order in which they are looked for.
FOLDERS: dict[str, Callable[..., Volume]] = {
    "zarr.json": open_zarr,
    ".zattrs": open_zarr,
    ".zgroup": open_zarr,
    ".zarray": open_zarr,
    "attributes.json": open_n5,
    "info": open_precomputed,
}
NEUROGLANCER = ("zarr://", "zarr2://", "zarr3://", "n5://", "precomputed://")
EXPECTED = "expected OME-Zarr, a TIFF file or a folder of TIFF sections, N5, precomputed, HDF5 or MRC"


def open_volume(
    url: str | os.PathLike[str],
    *,
    voxel_size: Nanometres | None = None,
    level: int = 0,
    channel: int | str | None = None,
) -> Volume:
    """Open a volume for reading.

    voxel_size: nm, z y x; overrides what the files say, and is needed where they say nothing. level: of OME-Zarr, N5
    and precomputed. channel: index along its channel axis, or its name in an OME-Zarr, needed when it has more than
    one. Raises InputError.
    """
    text = os.fspath(url)
    if text.startswith("phantom:"):
        return PhantomVolume.from_url(text)
    if text.startswith(SCHEME):
        _no_level(text, level)
        return open_spec(text, voxel_size=voxel_size, channel=channel)
    for scheme in NEUROGLANCER:
        text = text.removeprefix(scheme)
    where = absolute(text)
    if is_remote(where):
        return _remote(where)(where, voxel_size=voxel_size, level=level, channel=channel)
    path = Path(where)
    for key, opener in FOLDERS.items():
        if (path / key).is_file():
            return opener(where, voxel_size=voxel_size, level=level, channel=channel)
    if path.is_dir():
        if not section_files(path):
            raise InputError(f"{where} is a folder with neither Zarr metadata nor TIFF files, {EXPECTED}")
        _no_level(where, level)
        return open_tiff(path, voxel_size=voxel_size, channel=channel)
    return _open_file(where, level, voxel_size, channel)


def _open_file(where: str, level: int, voxel_size: Nanometres | None, channel: int | str | None) -> Volume:
    path, dataset = split_url(where)
    if dataset and not path.is_file():
        path = Path(where)
    if not path.exists():
        raise InputError(f"{where} does not exist; check the path")
    if not path.is_file():
        raise InputError(f"{where} is neither a file nor a folder, {EXPECTED}")
    _no_level(where, level)
    if is_hdf5(path):
        return open_hdf5(where, voxel_size=voxel_size, channel=channel)
    if is_tiff(path):
        return open_tiff(path, voxel_size=voxel_size, channel=channel)
    if is_png(path):
        _no_channel(where, "PNG", channel)
        return open_png(path, voxel_size=voxel_size)
    if is_spec_file(path):
        return open_spec(where, voxel_size=voxel_size, channel=channel)
    if not is_mrc(path):
        raise InputError(f"{where} is not a TIFF file, {EXPECTED}")
    _no_channel(where, "MRC", channel)
    return open_mrc(path, voxel_size=voxel_size)


def _no_channel(where: str, format: str, channel: int | str | None) -> None:
    if channel:
        raise InputError(f"{where} is {format}: it has no channel {channel}; leave --channel out")


def _no_level(where: str, level: int) -> None:
    if level:
        raise InputError(f"{where} has no level {level}: it has one resolution; leave --level out")


def _remote(url: str) -> Callable[..., Volume]:
    for key, opener in FOLDERS.items():
        if read_json(url, key) is not None:
            return opener
    raise InputError(
        f"{url} is not a Zarr, N5 or precomputed: none of {', '.join(FOLDERS)} can be read there; check the URL"
    )
