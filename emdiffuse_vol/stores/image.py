"""Writing OME-Zarr 0.5: one group, arrays "0" (full), "1", ... each half the one before.

Convention: shapes, chunks and shards are in the array's axes, z y x or c z y x; voxel size and origin are nm, z y x.
The centre of a voxel of level k lies (2^k - 1) / 2 full voxels further than that of the first, and its translation says
so. A *stored unit* is a shard, or a chunk where there are no shards: the file that one writer writes once.

    arrays first, the group's zarr.json last: a group that opens has all its arrays.

Inner chunks carry a crc32c, so that a damaged one is an error and not a picture.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from emdiffuse_vol.errors import GeometryError, InputError, OutputError
from emdiffuse_vol.geometry.boxes import Box, Triple, ceil_div
from emdiffuse_vol.stores.kvstore import CACHE_BYTES, absolute, context, kvstore, read_json, reason, write_json
from emdiffuse_vol.stores.pyramid import downsample, half
from emdiffuse_vol.stores.volume import DTYPES, Nanometres

# Measured on FIB-SEM greys: as small as blosc (0.865 of raw) and faster to write and to read; level 1 is no larger.
COMPRESSOR = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
CHECKSUM = {"name": "crc32c"}

# Planes of a coarse level made at a time: keeps what is read far below eight times the result.
COARSEN_PLANES = 32


def create_image(
    path: str,
    *,
    shape: Sequence[int],
    dtype: str,
    voxel_size: Nanometres,
    origin: Nanometres = (0.0, 0.0, 0.0),
    axes: Literal["zyx", "czyx"] = "zyx",
    chunk: Sequence[int],
    shard: Sequence[int] | None = None,
    levels: int = 1,
    name: str = "",
    omero: dict[str, Any] | None = None,
    attributes: dict[str, Any] | None = None,
) -> None:
    """Write the metadata of an empty image (all voxels 0). ``attributes`` of the group are stored beside "ome".

    Raises GeometryError when the parts do not fit each other, OutputError when there is a Zarr already or the place
    cannot be written.
    """
    url = absolute(path)
    _check_geometry(shape, dtype, axes, chunk, shard, levels)
    if any(read_json(url, key) for key in ("zarr.json", ".zgroup", ".zarray")):
        raise OutputError(f"{url} is a Zarr already, expected a new place; choose another or remove it")
    ome: dict[str, Any] = {"version": "0.5", "multiscales": [multiscale(name, axes, voxel_size, origin, levels)]}
    if omero is not None:
        ome["omero"] = omero
    try:
        for level in range(levels):
            array = _array(_level_shape(shape, level), dtype, axes, chunk, shard)
            write_json(f"{url}/{level}", "zarr.json", array)
        write_json(
            url, "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": (attributes or {}) | {"ome": ome}}
        )
    except ValueError as error:
        raise OutputError(f"{url} cannot be written: {reason(error)}") from error


def write_array(
    path: str | os.PathLike[str],
    greys: NDArray[Any],
    voxel_size: Nanometres,
    chunk: Sequence[int] = (16, 64, 64),
    **settings: Any,
) -> None:
    """An array in memory [(c,) z, y, x] as an image of one level, whole: a small one. settings: of create_image.

    Raises GeometryError, OutputError.
    """
    where = os.fspath(path)
    create_image(where, shape=greys.shape, dtype=greys.dtype.name, voxel_size=voxel_size, chunk=chunk, **settings)
    finish(write_units(open_array(where, 0, "w"), Box.of(greys.shape[-3:]), greys))


def open_array(
    path: str,
    level: int = 0,
    mode: Literal["r", "w"] = "r",
    *,
    cache_bytes: int = CACHE_BYTES,
    threads: int | None = None,
) -> ts.TensorStore:
    """A level of an image made by :func:`create_image`, axes labelled.

    mode "r" reads what is stored. mode "w" is for :func:`write_units`: its domain reaches up to whole stored units, so
    that edge shards too are replaced without being read, even if torn. threads: limit on coding and file access at a
    time (None: one per core).
    """
    url = absolute(path)
    metadata = read_json(f"{url}/{level}", "zarr.json")
    if metadata is None:
        raise InputError(f"{url} has no level {level}; check the path")
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": kvstore(url, str(level))}
    if mode == "w":
        cells = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        padded = [ceil_div(n, c) * c for n, c in zip(metadata["shape"], cells, strict=True)]
        spec["metadata"] = {k: v for k, v in metadata.items() if k != "attributes"} | {"shape": padded}
    resources = context(0 if mode == "w" else cache_bytes, threads)
    try:
        writing = mode == "w"
        return ts.open(spec, open=True, read=True, write=writing, assume_metadata=writing, context=resources).result()
    except ValueError as error:
        raise InputError(f"level {level} of {url} cannot be opened: {reason(error)}") from error


def write_units(array: ts.TensorStore, box: Box, block: NDArray[Any]) -> ts.Future[None]:
    """Start writing a block [(c,) z, y, x] to whole stored units; on disk, fsynced, when the future is done. Until
    then the block must not change.

    array: of ``open_array(..., "w")``. box: starts at a unit's start and ends at a unit's end or at the volume's face,
    where the block is padded with zeros. Raises GeometryError when it does not; see :func:`finish` for write errors.
    """
    unit = stored_unit(array)
    stop = [ceil_div(b, u) * u for b, u in zip(box.stop, unit, strict=True)]
    # Only the last unit of an axis may be cut short, by the volume's face.
    cut = (s not in (b, n) for b, s, n in zip(box.stop, stop, array.shape[-3:], strict=True))
    if any(cut) or any(a % u for a, u in zip(box.start, unit, strict=True)):
        raise GeometryError(f"box {box} cuts through stored units of {unit}; write whole ones")
    expected = (*array.shape[:-3], *box.shape)
    if (block.shape, block.dtype) != (expected, array.dtype.numpy_dtype):
        found = f"{block.dtype} {block.shape}"
        raise GeometryError(f"box {box} needs a block of {array.dtype.name} {expected}, found {found}")
    padding = [(0, 0)] * (block.ndim - 3) + [(0, s - b) for s, b in zip(stop, box.stop, strict=True)]
    whole = np.pad(block, padding) if any(b for _, b in padding) else block
    region: Any = (..., *(slice(a, s) for a, s in zip(box.start, stop, strict=True)))
    # Not with can_reference_source_data_indefinitely: tensorstore 0.1.86 then stores zeros for some shapes of chunks.
    return array[region].write(np.ascontiguousarray(whole)).commit


def stored_unit(array: ts.TensorStore) -> Triple:
    """Shape z y x of a shard, or of a chunk where there are no shards."""
    shape = array.chunk_layout.write_chunk.shape
    assert shape is not None
    z, y, x = (int(n or 1) for n in shape[-3:])
    return z, y, x


def finish(future: ts.Future[None] | None) -> None:
    """Wait until a write is on disk. Raises OutputError when it failed (disk full, no permission)."""
    if future is None:
        return
    try:
        future.result()
    except ValueError as error:
        raise OutputError(f"writing failed: {reason(error)}") from error


def coarsen(fine: ts.TensorStore, box: Box) -> NDArray[Any]:
    """Voxels of ``box`` of the next coarser level than ``fine``, which is of ``open_array(..., "r")``.

    Raises InputError when the finer level is damaged.
    """
    z, y, x = (slice(2 * a, min(2 * b, n)) for a, b, n in zip(box.start, box.stop, fine.shape[-3:], strict=True))
    thick = 2 * COARSEN_PLANES
    slabs: list[Any] = [(..., slice(a, min(a + thick, z.stop)), y, x) for a in range(z.start, z.stop, thick)]
    try:
        return np.concatenate([downsample(fine[slab].read().result()) for slab in slabs], axis=-3)
    except ValueError as error:
        raise InputError(f"the finer level cannot be read: {reason(error)}; make it again") from error


def _level_shape(shape: Sequence[int], level: int) -> list[int]:
    z, y, x = shape[-3:]
    spatial: Triple = (z, y, x)
    for _ in range(level):
        spatial = half(spatial)
    return [*shape[:-3], *spatial]


def multiscale(name: str, axes: str, size: Nanometres, origin: Nanometres, levels: int) -> dict[str, Any]:
    described = [
        {"name": a, "type": "channel"} if a == "c" else {"name": a, "type": "space", "unit": "nanometer"} for a in axes
    ]
    extra = len(axes) - 3
    datasets = []
    for level in range(levels):
        scale = [1.0] * extra + [float(s) * 2**level for s in size]
        translation = [0.0] * extra + [o + (2**level - 1) / 2 * s for o, s in zip(origin, size, strict=True)]
        steps = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": translation}]
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    method = {"description": "mean over 2x2x2 voxels", "method": "emdiffuse_vol.stores.pyramid.downsample"}
    return {"name": name, "axes": described, "datasets": datasets, "type": "mean", "metadata": method}


def _array(
    shape: Sequence[int], dtype: str, axes: str, chunk: Sequence[int], shard: Sequence[int] | None
) -> dict[str, Any]:
    """zarr.json of one array, zarr v3 core specification."""
    to_bytes: dict[str, Any] = {"name": "bytes"}
    if np.dtype(dtype).itemsize > 1:
        to_bytes["configuration"] = {"endian": "little"}
    codecs = [to_bytes, COMPRESSOR, CHECKSUM]
    if shard is not None:
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, CHECKSUM]
        inner = {"chunk_shape": list(chunk), "codecs": codecs, "index_codecs": index, "index_location": "end"}
        codecs = [{"name": "sharding_indexed", "configuration": inner}]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard or chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if dtype == "float32" else 0,
        "codecs": codecs,
        "attributes": {},
        "dimension_names": list(axes),
    }


def _check_geometry(
    shape: Sequence[int], dtype: str, axes: str, chunk: Sequence[int], shard: Sequence[int] | None, levels: int
) -> None:
    if dtype not in DTYPES:
        raise GeometryError(f"dtype {dtype} found, expected one of {', '.join(DTYPES)}")
    if axes not in ("zyx", "czyx"):
        raise GeometryError(f"axes {axes} found, expected zyx or czyx")
    for what, sizes in (("shape", shape), ("chunk", chunk), ("shard", shard or chunk)):
        if len(sizes) != len(axes) or min(sizes) < 1:
            raise GeometryError(f"{what} {tuple(sizes)} found, expected {len(axes)} positive sizes ({axes})")
    if shard is not None and any(s % c for s, c in zip(shard, chunk, strict=True)):
        raise GeometryError(f"shard {tuple(shard)} is not a multiple of chunk {tuple(chunk)}; choose one that is")
    if levels < 1:
        raise GeometryError(f"{levels} levels found, expected 1 or more")
