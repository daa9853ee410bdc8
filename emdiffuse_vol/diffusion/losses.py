"""Training losses, each a pure function of arrays.

Convention: arrays of any shape; a loss that compares with interpolation returns a ratio, 1 = no better than linear,
so that easy and hard crops, small and large factors weigh alike.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def squared_error_ratio(mean: Tensor, truth: Tensor, linear: Tensor, floor: float = 1e-4) -> Tensor:
    """Squared error over that of linear interpolation on the same voxels."""
    return (mean - truth).square().mean() / ((linear - truth).square().mean() + floor)


def fair_crps_pair(first: Tensor, second: Tensor, truth: Tensor) -> Tensor:
    """Fair continuous ranked probability score of a two-member ensemble, averaged over voxels.

    E|x - y| - E|x - x'| / 2, unbiased for K = 2 (Ferro 2014, doi:10.1002/qj.2270): its expectation is least when
    members are drawn from the distribution of the truth.
    """
    skill = ((first - truth).abs() + (second - truth).abs()) / 2
    return (skill - (first - second).abs() / 2).mean()


def multiscale_crps(first: Tensor, second: Tensor, truth: Tensor, cells: tuple[int, ...] = (1, 4)) -> Tensor:
    """Sum of :func:`fair_crps_pair` over means of ``cells`` x ``cells`` pixels in XY. Arrays are [n, 1, z, y, x].

    One voxel's score sees marginals only; scores of local means also make the members' texture right.
    """
    total = fair_crps_pair(first, second, truth)
    for cell in cells[1:]:
        pooled = (F.avg_pool3d(x, (1, cell, cell)) for x in (first, second, truth))
        total = total + fair_crps_pair(*pooled)
    return total
