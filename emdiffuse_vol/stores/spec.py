"""Checks that every format shares: what a volume claims to be must be something we can work with."""

from __future__ import annotations

import hashlib
import json
from math import isfinite
from typing import Any

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Triple
from emdiffuse_vol.stores.volume import DTYPES, Nanometres, VolumeSpec


def make_spec(
    name: str,
    *,
    shape: Triple,
    dtype: str,
    voxel_size: Nanometres | None,
    origin: Nanometres = (0.0, 0.0, 0.0),
    chunk: Triple | None = None,
    format: str,
    digest: str,
) -> VolumeSpec:
    """A checked VolumeSpec. Raises InputError that calls the volume ``name``."""
    if dtype not in DTYPES:
        raise InputError(f"{name} holds {dtype}, expected one of {', '.join(DTYPES)}; convert its greys first")
    if min(shape) < 1:
        raise InputError(f"{name} has shape {shape}: there are no voxels in it")
    if voxel_size is None:
        raise InputError(f"{name} does not say its voxel size; give --voxel-size Z,Y,X in nanometres")
    if not all(isfinite(v) and v > 0 for v in voxel_size) or not all(map(isfinite, origin)):
        raise InputError(f"{name} has voxel size {voxel_size} nm, expected positive numbers; give --voxel-size Z,Y,X")
    z, y, x = map(float, voxel_size)
    identity = {
        "format": format,
        "shape": list(shape),
        "dtype": dtype,
        "voxel_size": [z, y, x],
        "origin": list(origin),
        "digest": digest,
    }
    return VolumeSpec(shape, dtype, (z, y, x), origin, chunk, identity)


def digest_of(content: Any) -> str:
    """Hash of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
