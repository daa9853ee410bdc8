"""LPIPS: how alike two images look to a network (Zhang et al. 2018, arXiv:1801.03924, version 0.1 with AlexNet), and
Fréchet's distance between what it sees in two sets of images.

Convention: planes [z, y, x] of greys 0..255 are shown to the network as grey RGB pictures in -1..1, at least 63 pixels
wide. Its weights are a safetensors file that does not come with the package: ``benchmarks/lpips_offline.py`` makes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Stride and padding of the five convolutions, and whether a maximum over 3 x 3 in steps of 2 comes first.
LAYERS = ((4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False))
SMALLEST = 63  # pixels


class Lpips:
    """weights: ``conv0.weight`` [out, in, y, x], ``conv0.bias``, ``linear0`` [c], ... to 4."""

    def __init__(self, weights: dict[str, Tensor], device: str = "cpu") -> None:
        weights = {name: value.to(device) for name, value in weights.items()}
        self.convolutions = [(weights[f"conv{i}.weight"], weights[f"conv{i}.bias"]) for i in range(len(LAYERS))]
        self.linear = [weights[f"linear{i}"] for i in range(len(LAYERS))]
        self.device = device

    @staticmethod
    def load(path: Path, device: str = "cpu") -> Lpips:
        """Raises OSError, or ValueError where the file is another network's."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return Lpips(load_file(path), device)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} does not hold the weights of LPIPS: {error}") from error

    def features(self, planes: NDArray[Any]) -> list[Tensor]:
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

    def distance(self, a: list[Tensor], b: list[Tensor]) -> NDArray[np.float32]:
        """[z], 0 for equal planes. Maps of a truth serve all images that are compared with it."""
        parts = [
            torch.einsum("zcyx,c->zyx", (p - q).square(), w).mean((1, 2))
            for p, q, w in zip(a, b, self.linear, strict=True)
        ]
        return np.asarray(torch.stack(parts).sum(0).cpu(), np.float32)


class Gaussian:
    """Mean and covariance of vectors that come in parts."""

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.total = np.zeros(dimensions)
        self.products = np.zeros((dimensions, dimensions))

    def add(self, vectors: NDArray[Any]) -> None:
        """[n, dimensions]"""
        values = vectors.astype(np.float64)
        self.count += len(values)
        self.total += values.sum(0)
        self.products += values.T @ values

    @property
    def mean(self) -> NDArray[np.float64]:
        return self.total / self.count

    @property
    def covariance(self) -> NDArray[np.float64]:
        return (self.products - self.count * np.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), the formula of the FID (Heusel et al. 2017, arXiv:1706.08500)."""
    # The trace of (A B)^(1/2) is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric.
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    common = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b.covariance @ root), 0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * common)
