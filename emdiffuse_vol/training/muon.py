"""Muon: momentum whose update is made orthogonal, for the convolutions of a network (Jordan et al. 2024).

Convention: a kernel [cout, cin, ...] is taken as the matrix [cout, cin * ...]. The update is scaled by 0.2
sqrt(max(rows, columns)), which gives it the root mean square of an Adam update, so both share one learning rate (Liu
et al. 2025, arXiv:2502.16982, section 2.2). Biases, embeddings and output layers are left to AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrix, roughly: singular values end between about 0.7 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315  # a quintic that grows small singular values fastest
    wide = matrix.shape[0] <= matrix.shape[1]
    x: Tensor = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p.grad))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                ahead = torch.lerp(p.grad, buffer, group["momentum"]).flatten(1)
                update = orthogonal(ahead) * (0.2 * sqrt(max(ahead.shape)))
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view_as(p), alpha=group["lr"])
