"""Training losses, each a pure function of arrays.

Convention: arrays of any shape; a loss that compares with interpolation returns a ratio, 1 = no better than linear,
so that easy and hard crops, small and large factors weigh alike. A weight, where there is one, is 0 for voxels that
were not measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def average(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over voxels, or their weighted mean; the weight broadcasts."""
    if weight is None:
        return values.mean()
    weight = weight.expand_as(values)
    return (values * weight).sum() / weight.sum().clamp(min=1e-6)


def squared_error_ratio(
    mean: Tensor, truth: Tensor, linear: Tensor, weight: Tensor | None = None, floor: float = 1e-4
) -> Tensor:
    """Squared error over that of linear interpolation on the same voxels."""
    return average((mean - truth).square(), weight) / (average((linear - truth).square(), weight) + floor)


def fair_crps_pair(first: Tensor, second: Tensor, truth: Tensor, weight: Tensor | None = None) -> Tensor:
    """Fair continuous ranked probability score of a two-member ensemble, averaged over voxels.

    E|x - y| - E|x - x'| / 2, unbiased for K = 2 (Ferro 2014, doi:10.1002/qj.2270): its expectation is least when
    members are drawn from the distribution of the truth.
    """
    skill = ((first - truth).abs() + (second - truth).abs()) / 2
    return average(skill - (first - second).abs() / 2, weight)


def multiscale_crps(
    first: Tensor, second: Tensor, truth: Tensor, cells: tuple[int, ...] = (1, 4), weight: Tensor | None = None
) -> Tensor:
    """Sum of :func:`fair_crps_pair` over means of ``cells`` x ``cells`` pixels in XY. Arrays are [n, 1, z, y, x].

    One voxel's score sees marginals only; scores of local means also make the members' texture right. With a weight
    a cell's mean is the weighted one, and the cell weighs as much as its voxels.
    """
    total = fair_crps_pair(first, second, truth, weight)
    for cell in cells[1:]:
        window = (1, cell, cell)
        if weight is None:
            pooled, share = [F.avg_pool3d(x, window) for x in (first, second, truth)], None
        else:
            share = F.avg_pool3d(weight.expand_as(truth), window)
            pooled = [F.avg_pool3d(x * weight, window) / share.clamp(min=1e-6) for x in (first, second, truth)]
        total = total + fair_crps_pair(pooled[0], pooled[1], pooled[2], share)
    return total


def energy_score(first: Tensor, second: Tensor, truth: Tensor) -> Tensor:
    """Fair energy score of a two-member ensemble of whole patches [n, ...], averaged over n (Gneiting and Raftery 2007,
    doi:10.1198/016214506000001437): E||x - y|| - E||x - x'|| / 2, norms per root of the number of voxels.

    The CRPS of vectors: unlike a sum over voxels it also scores how they vary together.
    """

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).flatten(1).square().mean(dim=1).add(1e-12).sqrt()

    return ((distance(first, truth) + distance(second, truth)) / 2 - distance(first, second) / 2).mean()


def epsilon_error(estimate: Tensor, noise: Tensor) -> Tensor:
    """The published loss: mean squared error of the noise (Ho et al. 2020, eq. 14)."""
    return (estimate - noise).square().mean()


def difficulty_weighted(estimate: Tensor, noise: Tensor, log_phi: Tensor) -> Tensor:
    """The paper's loss (Lu et al. 2024): ||eps - eps_hat||^2 / (2 phi^2) + log phi, averaged over pixels.

    phi is the difficulty that the network predicts, through its logarithm. For a fixed error its least value is at
    phi = |error|: the negative log-likelihood of a normal distribution, up to a constant.
    """
    return ((estimate - noise).square() * torch.exp(-2 * log_phi) / 2 + log_phi).mean()


def dissimilarity(image: Tensor, truth: Tensor, data_range: float = 2.0, window: int = 7) -> Tensor:
    """1 - SSIM of [n, 1, y, x] (Wang et al. 2004), in windows of ``window`` x ``window`` pixels inside the image."""
    small, middling = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2

    def local(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    a, b = local(image), local(truth)
    variances = local(image.square()) - a.square() + local(truth.square()) - b.square()
    covariance = local(image * truth) - a * b
    similarity = (2 * a * b + small) * (2 * covariance + middling)
    return 1 - (similarity / ((a.square() + b.square() + small) * (variances + middling))).mean()
