"""Small Zarr v3 arrays of which single elements are changed: the ledger's.

Convention: up to some ten million elements, in cubic chunks, fill value 0. Writes are on disk when they return (file,
fsync, rename). Several processes may write elements of one chunk: each change is made to what is there. Nothing is
cached, so a reader sees what others have written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from emdiffuse_vol.errors import OutputError
from emdiffuse_vol.stores.kvstore import reason

Places = tuple[NDArray[np.int64], ...]  # of elements: an array of indices for each axis


def create_array(path: Path, shape: tuple[int, ...], dtype: str, edge: int) -> None:
    """edge: of the cubic chunks. Raises OutputError where something is there, or where it cannot be written."""
    metadata = {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [edge] * len(shape)}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "fill_value": 0,
    }
    try:
        ts.open(_spec(path) | {"metadata": metadata}, create=True).result()
    except ValueError as error:
        raise OutputError(f"{path} cannot be created: {reason(error)}") from error


def open_small(path: Path) -> ts.TensorStore:
    """Raises OutputError where it is missing or damaged."""
    try:
        return ts.open(_spec(path), open=True).result()
    except ValueError as error:
        raise OutputError(_damaged(path, error)) from error


def read_part(array: ts.TensorStore, part: Any = ...) -> NDArray[Any]:
    """Raises OutputError where it is damaged."""
    try:
        values: NDArray[Any] = array[part].read().result()
    except ValueError as error:
        raise OutputError(_damaged("an array", error)) from error
    return values


def write_elements(arrays: Mapping[str, ts.TensorStore], places: Places, values: Mapping[str, NDArray[Any]]) -> None:
    """Write elements of several arrays at the same places. Raises OutputError when they cannot be written."""
    try:
        for future in [arrays[name][places].write(elements) for name, elements in values.items()]:
            future.result()
    except ValueError as error:
        raise OutputError(f"the ledger cannot be written: {reason(error)}") from error


def edge_of(array: ts.TensorStore) -> int:
    """Of the chunks."""
    shape = array.chunk_layout.write_chunk.shape
    assert shape is not None
    return int(shape[0] or 1)


def _damaged(path: Any, error: ValueError) -> str:
    return f"the ledger is damaged, {path} cannot be read: {reason(error)}; remove the output or choose another"


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
