"""Reading neuroglancer precomputed images: raw, jpeg or png chunks, sharded or not.

Convention: stored axes are x, y, z, channel; ``resolution`` is nm, ``voxel_offset`` is in voxels and becomes the
origin. (Precomputed means by it the corner of the first voxel, OME-NGFF its centre: half a voxel is left out, so that
volumes which begin at 0 do so in every format.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import tensorstore as ts

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.stores.chunked import (
    ChunkedVolume,
    check_array,
    chunked_volume,
    open_chunked,
    spatial,
    voxel_size_of,
)
from emdiffuse_vol.stores.kvstore import absolute, inside, kvstore, read_json
from emdiffuse_vol.stores.volume import Nanometres

KEY = "info"
AXES = ("x", "y", "z", "c")


def open_precomputed(
    url: str, *, voxel_size: Nanometres | None = None, level: int = 0, channel: int | str | None = None
) -> ChunkedVolume:
    """``level``: number of the scale. ``voxel_size`` overrides its resolution. Raises InputError."""
    url = absolute(url)
    name = url.rsplit("/", 1)[-1]
    info = read_json(url, KEY) or {}
    scales = info.get("scales")
    if not isinstance(scales, list) or not scales:
        raise InputError(f"{name} has no scales in its info, expected a precomputed image; check the path")
    if not 0 <= level < len(scales):
        raise InputError(f"{name} has levels 0 to {len(scales) - 1}, found level {level}; give --level within them")
    if not isinstance(scales[level], dict):
        raise InputError(f"{name} has an info that makes no sense; correct it")
    key = inside(name, scales[level].get("key"))
    name = f"{name}/{key}"
    spec = {"driver": "neuroglancer_precomputed", "kvstore": kvstore(url), "scale_index": level}
    stored = open_chunked(name, spec)
    offset = stored.origin
    array = stored[ts.d[:].translate_to[0]]
    check_array(name, array)
    size = voxel_size or voxel_size_of(array, AXES)
    first = spatial(offset, AXES)
    return chunked_volume(
        url,
        {"voxel_size": voxel_size, "level": level, "channel": channel},
        name,
        array,
        AXES,
        voxel_size=size,
        origin=(first[0] * size[0], first[1] * size[1], first[2] * size[2]) if size else (0.0, 0.0, 0.0),
        format="precomputed",
        digested=[info, level],
        chunk_name=partial(_chunk, offset),
    )


def _chunk(offset: Sequence[int], cell: Sequence[int], part: Sequence[Any]) -> str:
    """Name of the file of a chunk, counted from the offset, as precomputed has it."""
    return "_".join(f"{p.start + o}-{p.stop + o}" for p, o in zip(part[:3], offset[:3], strict=True))
