"""Small inputs and runs for tests: real OME-Zarr on disk, untrained networks, the whole engine."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from networks import random_slab

from emdiffuse_vol.models.checkpoints import save_weights
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.run import reconstruct
from emdiffuse_vol.stores.image import open_array, write_array

MODES = ["vEMDiffuse-i", "vEMDiffuse-a"]


def smooth_volume(shape: tuple[int, int, int], seed: int = 0, dtype: str = "uint8") -> np.ndarray:
    """Correlated random greys, mean 130, standard deviation 30."""
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), (0.7, 2, 2))
    greys = 130 + 30 * noise / noise.std()
    return greys.astype(np.float32) if dtype == "float32" else np.clip(greys, 1, 255).astype(dtype)


def write_volume(path: Path, greys: np.ndarray, voxel_size: tuple[float, float, float]) -> Path:
    write_array(path, greys, voxel_size, chunk=(8, 64, 64))
    return path


def write_weights(path: Path) -> Path:
    config = {"width": 8, "deep": 12}
    save_weights(path, random_slab(**config), architecture="slab", config=config, modes=MODES, gaps=[1.1, 20])
    return path


def small_request(folder: Path, **settings: Any) -> Request:
    """15 sections, factor 5: 71 x 60 x 100 voxels in 2 x 1 x 2 blocks; a tile owns as much as a block."""
    folder.mkdir(exist_ok=True)
    if not (folder / "in.zarr").exists():
        write_volume(folder / "in.zarr", smooth_volume((15, 60, 100)), (50, 10, 10))
        write_weights(folder / "w.safetensors")
    request = Request(
        input=str(folder / "in.zarr"),
        out=str(folder / "out.zarr"),
        weights=str(folder / "w.safetensors"),
        shard=(64, 64, 64),
        tile=(64, 64, 64),
    )
    return replace(request, **settings)


def run(request: Request) -> np.ndarray:
    """-> codes [2, z, y, x]"""
    reconstruct(request)
    return read(request.out)


def read(path: str | Path, level: int = 0) -> np.ndarray:
    return open_array(str(path), level).read().result()


def file_hashes(path: str | Path) -> dict[str, str]:
    """Of every array's shards and chunks: what "the same bytes" means. Times and settings differ between runs."""
    files = sorted(f for f in Path(path).rglob("*") if f.is_file() and f.relative_to(path).parts[0].isdigit())
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
