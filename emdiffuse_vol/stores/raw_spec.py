"""Any array that tensorstore can open, by a spec of its own: ``tensorstore:{...}`` or a JSON file with that.

Convention: axes are what the dimension labels say; without labels an array has three, z, y, x. Units of dimensions give
the voxel size. Specs are opened for reading only, whatever they say of creating or deleting.
"""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import tensorstore as ts

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import AXES
from emdiffuse_vol.stores.chunked import (
    LARGEST_SIZE,
    ChunkedVolume,
    check_array,
    chunked_volume,
    joined,
    open_chunked,
    voxel_size_of,
)
from emdiffuse_vol.stores.volume import Nanometres

SCHEME = "tensorstore:"
LARGEST_FILE = 1 << 20  # bytes
METADATA = ("zarr.json", ".zarray", "attributes.json", "info")


def is_spec_file(path: Path) -> bool:
    return path.suffix == ".json" and path.is_file()


def open_spec(url: str, *, voxel_size: Nanometres | None = None, channel: int | str | None = None) -> ChunkedVolume:
    """``url``: "tensorstore:{...}" or the path of a JSON file. Raises InputError."""
    name, spec = _read(url)
    _check_nesting(name, spec)
    opened = open_chunked(name, spec | {"create": False, "delete_existing": False, "open": True})
    if any(n > LARGEST_SIZE for n in opened.shape):
        raise InputError(f"{name} has shape {opened.shape}: that is no volume; check the spec")
    array = opened[ts.d[:].translate_to[0]] if opened.rank else opened
    axes = _axes(name, array)
    check_array(name, array)
    return chunked_volume(
        url,
        {"voxel_size": voxel_size, "channel": channel},
        name,
        array,
        axes,
        voxel_size=voxel_size or voxel_size_of(array, axes),
        format="tensorstore",
        digested=[spec],
        chunk_name=partial(joined, "", ","),
    )


def _read(url: str) -> tuple[str, dict[str, Any]]:
    name = "the spec" if url.startswith(SCHEME) else Path(url).name
    if not url.startswith(SCHEME) and Path(url).stat().st_size > LARGEST_FILE:
        raise InputError(f"{url} is larger than a tensorstore spec can be; check the path")
    try:
        spec = json.loads(url.removeprefix(SCHEME) if url.startswith(SCHEME) else Path(url).read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON ({error}), expected a tensorstore spec; correct it") from error
    if not isinstance(spec, dict) or "driver" not in spec:
        raise InputError(f"{name} is no tensorstore spec, expected a JSON object with a driver; correct it")
    return name, spec


def _check_nesting(name: str, node: Any) -> None:
    """Metadata nested without end, wherever in the spec there is a store, would end the process inside tensorstore."""
    if isinstance(node, list):
        for part in node:
            _check_nesting(name, part)
    elif isinstance(node, dict):
        for key, part in node.items():
            _check_nesting(name, part)
            if key == "kvstore":
                with suppress(ValueError, TypeError, ArithmeticError):  # tensorstore will say it better
                    _check_files(name, ts.KvStore.open(part).result())


def _check_files(name: str, store: ts.KvStore) -> None:
    if store.path and not store.path.endswith("/"):
        store.path += "/"
    for file in METADATA:
        _parse(f"{file} of {name}", store.read(file).result().value or b"{}")


def _parse(name: str, text: bytes) -> None:
    try:
        json.loads(text)
    except RecursionError as error:
        raise InputError(f"{name} is nested too deeply; copy it again from its source") from error


def _axes(name: str, array: ts.TensorStore) -> tuple[str, ...]:
    labels = [label.lower() for label in array.domain.labels]
    axes = tuple("c" if label == "channel" else label or f"axis {i}" for i, label in enumerate(labels))
    if all(axes.count(a) == 1 for a in AXES):
        return axes
    if array.rank != 3 or any(labels):
        raise InputError(f"{name} has axes ({', '.join(axes)}), expected z, y and x; label its dimensions")
    return tuple(AXES)
