"""Small Zarr v3 arrays that are changed element by element by one process: the ledger's.

Convention: shapes up to a few million elements; fill value 0; writes are durable when their future is done (file,
fsync, rename). No cache is trusted across processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorstore as ts

CHUNK = 16


def create_array(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Raises ValueError where something is already there."""
    metadata = {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [min(CHUNK, n) for n in shape]}},
        "fill_value": 0,
    }
    ts.open(_spec(path) | {"metadata": metadata}, create=True).result()


def open_small(path: Path) -> ts.TensorStore:
    return ts.open(_spec(path), open=True).result()


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
