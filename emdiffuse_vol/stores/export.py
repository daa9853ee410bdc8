"""A volume in the formats of other programs: TIFF, HDF5, N5, neuroglancer precomputed, OME-Zarr 0.4.

Convention: as for :mod:`emdiffuse_vol.stores.convert`, targets appear whole, under their name, once they are done.
Formats in folders get a pyramid (TIFF series do not) and go on after a kill; TIFF stacks and HDF5 files begin anew.

    tiff          one file, OME-TIFF, BigTIFF where it must be, uncompressed
    tiff-series   a folder, an OME-TIFF for each section
    hdf5          file.h5:/path, chunked; attributes resolution and offset (nm), element_size_um, all z y x
    n5            a group of s0, s1, ...; gzip; pixelResolution and downsamplingFactors
    precomputed   raw, or jpeg for uint8
    ome-zarr-0.4  Zarr v2, blosc
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import tensorstore as ts
import tifffile
from numpy.typing import NDArray

from emdiffuse_vol.errors import InputError, OutputError
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.stores.convert import CHUNK, ZARR_KEYS, Progress, build, check_local, convert, shard_for, silent
from emdiffuse_vol.stores.copying import Target, Write
from emdiffuse_vol.stores.hdf5 import is_hdf5, split_url
from emdiffuse_vol.stores.image import multiscale
from emdiffuse_vol.stores.kvstore import context, is_remote, kvstore, reason, write_json
from emdiffuse_vol.stores.pyramid import pyramid_shapes
from emdiffuse_vol.stores.spec import digest_of
from emdiffuse_vol.stores.tiff import is_tiff, section_files
from emdiffuse_vol.stores.volume import Volume, VolumeSpec

SUFFIXES = {
    ".zarr": "ome-zarr",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".n5": "n5",
    ".precomputed": "precomputed",
}
DATASET = "/volume"  # in HDF5, where none is named
UM = 1e-3  # nm


def format_of(target: str) -> str | None:
    """By the suffix; None where that says nothing."""
    return SUFFIXES.get(split_url(target)[0].suffix.lower())


def export(
    volume: Volume,
    target: str | os.PathLike[str],
    format: str,
    *,
    jpeg: bool = False,
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> None:
    """Write a volume to ``target``, a local path. format: a key of FORMATS, or ome-zarr (0.5).

    jpeg: of precomputed. overwrite: replace a volume of the same format that is there. provenance: JSON values, kept
    in OME-Zarr. progress: called with units done and in all. Raises OutputError, or InputError when reading fails; then
    nothing is left.
    """
    text = os.fspath(target)
    if format == "ome-zarr":
        return convert(volume, text, chunk=CHUNK, overwrite=overwrite, provenance=provenance, progress=progress)
    if jpeg and (format != "precomputed" or volume.spec.dtype != "uint8"):
        raise OutputError(f"jpeg is for uint8 in precomputed, found {volume.spec.dtype} and {format}; leave it out")
    file, dataset = split_url(text) if format == "hdf5" and not is_remote(text) else (text, "")
    place = check_local(file, overwrite)
    recognise, make, resumable = FORMATS[format]
    if os.path.lexists(place) and not recognise(place):
        raise OutputError(f"{place} exists and is not {format}, so it is not overwritten; choose another place")
    options = {"jpeg": jpeg, "dataset": dataset or DATASET, "name": place.stem, "provenance": provenance}
    if format == "tiff-series":
        options["boot"] = _boot()
    key = digest_of([volume.spec.identity, volume.url, format, options]) if resumable else None
    build(volume, place, lambda path, begun: make(path, begun, volume.spec, options), key, progress)


def _boot() -> str:
    """Of this machine. Sections are written through memory, which a kill does not lose but a power cut does."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    return uuid4().hex


@dataclass(frozen=True)
class Arrays:
    """A pyramid of tensorstore's arrays, z y x."""

    levels: list[ts.TensorStore]
    chunk: Triple

    @property
    def shapes(self) -> list[Triple]:
        return [(a.shape[0], a.shape[1], a.shape[2]) for a in self.levels]

    def unit(self, level: int) -> Triple:
        return shard_for(self.shapes[level], self.chunk)

    def writer(self, level: int) -> Write:
        array = self.levels[level]
        return lambda box, greys: array[box.slices()].write(np.ascontiguousarray(greys)).commit

    def reader(self, level: int) -> ts.TensorStore:
        return self.levels[level]

    def close(self) -> None:
        pass


def _open(spec: dict[str, Any], begun: bool) -> ts.TensorStore:
    # Every voxel is written once and read once, in whole chunks: a cache would only hold what nobody asks for again.
    how: dict[str, Any] = {"open": True} if begun else {"create": True}
    try:
        return ts.open(spec, read=True, write=True, context=context(1 << 20), **how).result()
    except ValueError as error:
        raise OutputError(f"the output cannot be created: {reason(error)}; choose another place or format") from error


def _n5(path: Path, begun: bool, spec: VolumeSpec, options: dict[str, Any]) -> Target:
    levels = []
    size = {"dimensions": list(reversed(spec.voxel_size)), "unit": "nm"}
    for level, shape in enumerate(pyramid_shapes(spec.shape)):
        metadata = {
            "dimensions": shape[::-1],
            "blockSize": CHUNK,
            "dataType": spec.dtype,
            "compression": {"type": "gzip"},
            "downsamplingFactors": [2**level] * 3,
        }
        folder = kvstore(str(path), f"s{level}")
        levels.append(_open({"driver": "n5", "kvstore": folder, "metadata": metadata}, begun)[ts.d[:].transpose[::-1]])
    if not begun:
        write_json(str(path), "attributes.json", {"n5": "2.0.0", "pixelResolution": size, "name": options["name"]})
    return Arrays(levels, CHUNK)


def _precomputed(path: Path, begun: bool, spec: VolumeSpec, options: dict[str, Any]) -> Target:
    levels = []
    for level, shape in enumerate(pyramid_shapes(spec.shape)):
        size = [s * 2**level for s in reversed(spec.voxel_size)]
        scale = {
            "size": shape[::-1],
            "chunk_size": CHUNK,
            "encoding": "jpeg" if options["jpeg"] else "raw",
            "resolution": size,
            # Counted in voxels: what is left over of an origin that is not a multiple of the voxel size is lost.
            "voxel_offset": [round(o / s) for o, s in zip(reversed(spec.origin), size, strict=True)],
        }
        opened = _open(
            {
                "driver": "neuroglancer_precomputed",
                "kvstore": kvstore(str(path)),
                "multiscale_metadata": {"type": "image", "data_type": spec.dtype, "num_channels": 1},
                "scale_metadata": scale,
            },
            begun,
        )
        levels.append(opened[ts.d[:].translate_to[0]][..., 0][ts.d[:].transpose[::-1]])
    return Arrays(levels, CHUNK)


def _zarr_v2(path: Path, begun: bool, spec: VolumeSpec, options: dict[str, Any]) -> Target:
    shapes = pyramid_shapes(spec.shape)
    levels = []
    for level, shape in enumerate(shapes):
        metadata = {
            "shape": shape,
            "chunks": CHUNK,
            "dtype": np.dtype(spec.dtype).newbyteorder("<").str,
            "compressor": {"id": "blosc", "cname": "zstd", "clevel": 3, "shuffle": 1},
            "dimension_separator": "/",
            "fill_value": 0,
        }
        levels.append(_open({"driver": "zarr", "kvstore": kvstore(str(path), str(level)), "metadata": metadata}, begun))
    if not begun:
        described = multiscale(options["name"], "zyx", spec.voxel_size, spec.origin, len(shapes)) | {"version": "0.4"}
        made = (options["provenance"] or {}) | {"source": spec.identity}
        for level in range(len(shapes)):  # for xarray, which Zarr v2 tells no other way
            write_json(f"{path}/{level}", ".zattrs", {"_ARRAY_DIMENSIONS": ["z", "y", "x"]})
        write_json(str(path), ".zattrs", {"multiscales": [described], "emdvol": made})
        write_json(str(path), ".zgroup", {"zarr_format": 2})
    return Arrays(levels, CHUNK)


@dataclass(frozen=True)
class TiffFiles:
    """Uncompressed greys in files that are there already: where each section begins."""

    shape: Triple
    dtype: str
    files: list[Path]
    offset: int  # of the first section in its file

    @property
    def shapes(self) -> list[Triple]:
        return [self.shape]

    def unit(self, level: int) -> Triple:
        return shard_for(self.shape, CHUNK)

    def writer(self, level: int) -> Write:
        return self._write

    def _write(self, box: Box, greys: NDArray[Any]) -> None:
        depth = self.shape[0] // len(self.files)
        z, y, x = box.slices()
        for file in self.files[z] if depth == 1 else self.files:
            stored = np.memmap(file, self.dtype, "r+", self.offset, (depth, *self.shape[1:]))
            part = slice(0, 1) if depth == 1 else z
            stored[part, y, x] = greys[: part.stop - part.start]
            greys = greys[part.stop - part.start :]

    def reader(self, level: int) -> ts.TensorStore:
        raise NotImplementedError  # there are no coarser levels

    def close(self) -> None:
        for file in self.files:
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())


def _tiff(path: Path, begun: bool, spec: VolumeSpec, options: dict[str, Any]) -> Target:
    return TiffFiles(spec.shape, spec.dtype, [path], _empty_tiff(path, spec.shape, spec, options["name"]))


def _tiff_series(path: Path, begun: bool, spec: VolumeSpec, options: dict[str, Any]) -> Target:
    depth, height, width = spec.shape
    path.mkdir(exist_ok=True)
    digits = max(4, len(str(depth - 1)))
    files = [path / f"{options['name']}_{z:0{digits}d}.tif" for z in range(depth)]
    if not begun:
        offset = _empty_tiff(files[0], (1, height, width), spec, options["name"])
        end = offset + height * width * np.dtype(spec.dtype).itemsize
        with files[0].open("rb") as first:
            head = first.read(offset)
            first.seek(end)
            tail = first.read()
        for other in files[1:]:  # the same but for the greys: much faster than describing each
            with other.open("wb") as file:
                file.write(head)
                file.seek(end)
                file.write(tail)
                file.truncate(end + len(tail))  # also where there is no tail
    return TiffFiles(spec.shape, spec.dtype, files, _data_offset(files[0]))


def _empty_tiff(path: Path, shape: Triple, spec: VolumeSpec, name: str) -> int:
    """Write a file of zeros. -> where its greys begin."""
    z, y, x = (s * UM for s in spec.voxel_size)
    units = {f"PhysicalSize{axis}Unit": "µm" for axis in "ZYX"}
    metadata = {"axes": "ZYX", "Name": name, "PhysicalSizeZ": z, "PhysicalSizeY": y, "PhysicalSizeX": x} | units
    tifffile.imwrite(path, shape=shape, dtype=spec.dtype, ome=True, photometric="minisblack", metadata=metadata)
    return _data_offset(path)


def _data_offset(path: Path) -> int:
    with tifffile.TiffFile(path) as tif:
        offset = tif.series[0].dataoffset
    assert offset is not None  # uncompressed and in one piece, as we wrote it
    return int(offset)


@dataclass(frozen=True)
class Hdf5Dataset:
    file: Any
    dataset: Any

    @property
    def shapes(self) -> list[Triple]:
        return [self.dataset.shape]

    def unit(self, level: int) -> Triple:
        return shard_for(self.dataset.shape, self.dataset.chunks)

    def writer(self, level: int) -> Write:
        return self._write

    def _write(self, box: Box, greys: NDArray[Any]) -> None:
        self.dataset[box.slices()] = greys  # h5py lets one thread in at a time

    def reader(self, level: int) -> ts.TensorStore:
        raise NotImplementedError  # there are no coarser levels

    def close(self) -> None:
        self.file.close()


def _hdf5(path: Path, begun: bool, spec: VolumeSpec, options: dict[str, Any]) -> Target:
    try:
        import h5py
    except ImportError as error:
        raise InputError("HDF5 needs h5py; pip install 'emdiffuse_vol[formats]'") from error
    file = h5py.File(path, "w")
    chunks = tuple(min(c, n) for c, n in zip(CHUNK, spec.shape, strict=True))
    dataset = file.create_dataset(options["dataset"], spec.shape, spec.dtype, chunks=chunks)
    dataset.attrs["resolution"] = spec.voxel_size
    dataset.attrs["offset"] = spec.origin
    dataset.attrs["element_size_um"] = [s * UM for s in spec.voxel_size]
    return Hdf5Dataset(file, dataset)


def _has(*keys: str) -> Callable[[Path], bool]:
    return lambda place: any((place / key).is_file() for key in keys)


def _is_series(place: Path) -> bool:
    """A folder with nothing but sections."""
    return place.is_dir() and 0 < len(section_files(place)) == len(list(place.iterdir()))


Make = Callable[[Path, bool, VolumeSpec, dict[str, Any]], Target]

# How one that is there is recognised, how one is made or gone on with, whether it can be gone on with.
FORMATS: dict[str, tuple[Callable[[Path], bool], Make, bool]] = {
    "tiff": (lambda place: place.is_file() and is_tiff(place), _tiff, False),
    "tiff-series": (_is_series, _tiff_series, True),
    "hdf5": (lambda place: place.is_file() and is_hdf5(place), _hdf5, False),
    "n5": (_has("attributes.json"), _n5, True),
    "precomputed": (_has("info"), _precomputed, True),
    "ome-zarr-0.4": (_has(*ZARR_KEYS), _zarr_v2, True),
}
