"""A volume out of a chunked array that tensorstore reads: Zarr, N5, neuroglancer precomputed, or any spec of its own.

Convention: ``axes`` names the axes as stored, in any order, lower case, "c" for channels; whatever is stored, a volume
is read z y x. Axes other than z, y, x must have size 1, except one channel axis when ``channel`` says which to take, by
index or by name. Chunks stay compressed until they are read, so one larger than ``LARGEST_CHUNK`` is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import AXES, Box, Triple, ceil_div
from emdiffuse_vol.stores.kvstore import context, reason
from emdiffuse_vol.stores.spec import digest_of, make_spec
from emdiffuse_vol.stores.units import nanometres
from emdiffuse_vol.stores.volume import Nanometres, VolumeSpec

LARGEST_CHUNK = 1 << 30  # bytes; a chunk is decoded whole
LARGEST_SIZE = 1 << 40  # voxels along an axis; tensorstore says 2^62 for "without end"

# Index of a chunk and the part of the array that it holds -> its name, for messages.
ChunkName = Callable[[Sequence[int], Sequence[slice]], str]


def joined(prefix: str, separator: str, cell: Sequence[int], part: Sequence[slice]) -> str:
    """Names of chunks in Zarr and N5; a ChunkName when its first two arguments are given."""
    return prefix + separator.join(map(str, cell))


@dataclass(eq=False)
class ChunkedVolume:
    """array: as stored, its first voxel at 0; region: its part that is this volume, where axes z y x are None and the
    others an index."""

    url: str
    options: dict[str, Any]
    spec: VolumeSpec
    name: str
    axes: tuple[str, ...]
    region: tuple[int | None, ...]
    chunk_name: ChunkName
    array: ts.TensorStore = field(repr=False)

    def read(self, box: Box) -> NDArray[Any]:
        assert box in Box.of(self.spec.shape), f"box {box} is not inside shape {self.spec.shape}"
        view = self.array[self._index(box)].transpose(self._order)
        try:
            return np.asarray(view.read().result())
        except ValueError as error:
            for key, part in self._chunks(box):
                _check_chunk(self.array, part, f"chunk {key} of {self.name}")
            raise InputError(f"{self.name} cannot be read at {box}: {reason(error)}") from error

    @property
    def _order(self) -> list[int]:
        """Where z, y, x are among the axes that stay."""
        spatial = [a for a in self.axes if a in AXES]
        return [spatial.index(a) for a in AXES]

    def _index(self, box: Box) -> tuple[slice | int, ...]:
        slices = dict(zip(AXES, box.slices(), strict=True))
        return tuple(slices[a] if i is None else i for a, i in zip(self.axes, self.region, strict=True))

    def _chunks(self, box: Box) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """Name of each stored chunk (for sharded arrays: shard) that the box touches, and the part it touches."""
        index = [i if isinstance(i, slice) else slice(i, i + 1) for i in self._index(box)]
        cells = sizes_of(self.array.chunk_layout.write_chunk)
        grid = (range(i.start // c, ceil_div(i.stop, c)) for i, c in zip(index, cells, strict=True))
        for cell in product(*grid):
            whole = [
                slice(n * c, min(size, (n + 1) * c)) for n, c, size in zip(cell, cells, self.array.shape, strict=True)
            ]
            touched = (slice(max(i.start, w.start), min(i.stop, w.stop)) for i, w in zip(index, whole, strict=True))
            yield self.chunk_name(cell, whole), tuple(touched)


def chunked_volume(
    url: str,
    options: dict[str, Any],
    name: str,
    array: ts.TensorStore,
    axes: tuple[str, ...],
    *,
    voxel_size: Nanometres | None,
    origin: Nanometres = (0.0, 0.0, 0.0),
    channels: Sequence[str] = (),
    format: str,
    digested: Sequence[Any],
    chunk_name: ChunkName,
) -> ChunkedVolume:
    """options: of ``open_volume``, the channel among them; digested: JSON values that tell this volume from another.
    Raises InputError that calls it ``name``."""
    region = choose_region(name, axes, array.shape, options["channel"], channels)
    spec = make_spec(
        name,
        shape=spatial(array.shape, axes),
        dtype=array.dtype.name,
        voxel_size=voxel_size,
        origin=origin,
        chunk=spatial(sizes_of(array.chunk_layout.read_chunk), axes),
        format=format,
        digest=digest_of([*digested, region]),
    )
    return ChunkedVolume(url, options, spec, name, axes, region, chunk_name, array)


def sizes_of(grid: ts.ChunkLayout.Grid) -> tuple[int, ...]:
    assert grid.shape is not None
    return tuple(int(n or 1) for n in grid.shape)


def _check_chunk(array: ts.TensorStore, part: tuple[slice, ...], name: str) -> None:
    try:
        array[part].read().result()
    except ValueError as error:
        raise InputError(f"{name} is damaged: {reason(error)}; copy it again from its source") from error


def open_chunked(name: str, spec: dict[str, Any]) -> ts.TensorStore:
    """The array of a tensorstore spec, for reading alone. Raises InputError that calls it ``name``."""
    # An input does not change while it is read: without this every cached chunk is asked for again on every read.
    try:
        spec = {"recheck_cached_data": "open"} | spec
        return ts.open(spec, open=True, create=False, read=True, write=False, context=context()).result()
    except (ValueError, TypeError, ArithmeticError) as error:  # also of numbers in a spec that are no 64-bit integers
        raise InputError(f"{name} cannot be opened: {reason(error)}; write it with another codec or dtype") from error


def check_array(name: str, array: ts.TensorStore) -> None:
    """Raises InputError for an array without end, or in chunks that no memory should hold."""
    if any(n > LARGEST_SIZE for n in array.shape):
        raise InputError(f"{name} has shape {array.shape}: that is no volume; check its metadata")
    try:
        cells = sizes_of(array.chunk_layout.read_chunk)
    except ValueError as error:
        raise InputError(f"{name} has chunks that make no sense: {reason(error)}; correct its metadata") from error
    # Also what reaches beyond the array is decoded.
    if (size := prod(cells) * array.dtype.numpy_dtype.itemsize) > LARGEST_CHUNK:
        raise InputError(
            f"{name} is stored in chunks of {size / 2**30:.3g} GiB, expected at most {LARGEST_CHUNK / 2**30:g}; "
            "write it in smaller ones"
        )


def spatial(values: Sequence[int], axes: Sequence[str]) -> Triple:
    """Those of z, y and x."""
    z, y, x = (values[axes.index(a)] for a in AXES)
    return z, y, x


def voxel_size_of(array: ts.TensorStore, axes: Sequence[str]) -> Nanometres | None:
    """As tensorstore knows it from the format's metadata; None unless all three are lengths."""
    units = dict(zip(axes, array.dimension_units, strict=True))
    sizes = []
    for axis in AXES:
        unit = units[axis]
        nm = None if unit is None else nanometres(unit.base_unit)
        if unit is None or nm is None:
            return None
        sizes.append(unit.multiplier * nm)
    return sizes[0], sizes[1], sizes[2]


def choose_region(
    name: str, axes: Sequence[str], shape: Sequence[int], channel: int | str | None, channels: Sequence[str] = ()
) -> tuple[int | None, ...]:
    """None for z, y, x; for any other axis the index that is read. channels: their names, if any. Raises InputError."""
    if len(shape) != len(axes):
        raise InputError(f"{name} has shape {tuple(shape)}, its metadata {len(axes)} axes; correct its metadata")
    names = f" ({', '.join(channels)})" if any(channels) else ""
    if isinstance(channel, str):
        if channel not in channels:
            raise InputError(f"{name} has no channel called {channel}{names}; give its number")
        channel = list(channels).index(channel)
    region: list[int | None] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis in AXES:
            region.append(None)
        elif axis == "c" and channel is not None:
            if not 0 <= channel < size:
                raise InputError(f"{name} has channels 0 to {size - 1}, found channel {channel}; choose one of them")
            region.append(channel)
        elif size == 1:
            region.append(0)
        elif axis == "c":
            raise InputError(f"{name} has {size} channels{names}, expected 1; choose one with --channel")
        else:
            raise InputError(f"{name} has {size} positions along {axis}, expected 1; extract one first")
    return tuple(region)
