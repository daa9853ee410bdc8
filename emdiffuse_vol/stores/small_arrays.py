"""Small Zarr v3 arrays that are changed element by element by one process: the ledger's.

Convention: shapes up to a few million elements; fill value 0; writes are durable when their future is done (file,
fsync, rename). No cache is trusted across processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorstore as ts

from emdiffuse_vol.errors import OutputError
from emdiffuse_vol.stores.kvstore import reason

CHUNK = 16


def create_array(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Raises OutputError where something is already there, or where it cannot be written."""
    metadata = {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [min(CHUNK, n) for n in shape]}},
        "fill_value": 0,
    }
    try:
        ts.open(_spec(path) | {"metadata": metadata}, create=True).result()
    except ValueError as error:
        raise OutputError(f"{path} cannot be created: {reason(error)}") from error


def open_small(path: Path) -> ts.TensorStore:
    try:
        return ts.open(_spec(path), open=True).result()
    except ValueError as error:
        raise OutputError(
            f"the ledger is damaged, {path} cannot be opened: {reason(error)}; remove the output or choose another"
        ) from error


def write_elements(values: dict[ts.TensorStore, float], place: tuple[int, ...]) -> None:
    """Write one element of several arrays; on disk when it returns. Raises OutputError when it cannot be written."""
    try:
        for future in [array[place].write(value) for array, value in values.items()]:
            future.result()
    except ValueError as error:
        raise OutputError(f"the ledger cannot be written: {reason(error)}") from error


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
