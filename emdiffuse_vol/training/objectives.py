"""What a network is trained to do: batches of one kind, and the loss of a network on them.

Convention: a batch is made from (generator, step) alone, on the CPU; ``stochastic`` says that the spread is trained
too. ``score`` is what the held-out part says, the gain in dB over interpolation (or over the input, where that is the
guess to beat) first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from emdiffuse_vol.diffusion.losses import (
    average,
    difficulty_weighted,
    energy_score,
    epsilon_error,
    multiscale_crps,
    squared_error_ratio,
)
from emdiffuse_vol.diffusion.samplers import dpm_solver_2m
from emdiffuse_vol.diffusion.schedules import published_train, uniform_log_snr
from emdiffuse_vol.metrics.image import psnr, ssim
from emdiffuse_vol.metrics.interpolation import linear
from emdiffuse_vol.metrics.spread import fair_crps
from emdiffuse_vol.models.slab import SlabNet, slab_features
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.training.augment import Augment, augment
from emdiffuse_vol.training.crops import Crop, cut_crop, random_crop
from emdiffuse_vol.training.sources import Cubes, Pair
from emdiffuse_vol.training.volumes import FloatArray, TrainingVolume, predict_volume, refill

RANGE = 2.0  # of normalised greys, for PSNR and SSIM
SCORED = (5, 10)  # factors at which progress is watched, where the training has them
SCORED_SIDE = 96  # voxels along each axis of the part of a held-out volume that is scored again and again


class Objective(Protocol):
    def batch(self, rng: np.random.Generator, step: int) -> Any: ...

    def loss(
        self, net: Any, batch: Any, generator: torch.Generator, stochastic: bool
    ) -> tuple[Tensor, dict[str, float]]: ...

    def score(self, net: Any) -> dict[str, float]: ...

    def picture(self, net: Any) -> FloatArray:
        """[y, x]: condition, prediction and truth side by side, normalised greys."""
        ...

    def set_teacher(self, net: Any, stochastic: bool) -> None:
        """Let the network as it was at some step fill what the data lack; asked for only where they lack something."""
        ...

    @property
    def lacking(self) -> bool: ...


@dataclass(frozen=True)
class Sizes:
    batch: int
    planes: int
    patch: int
    factors: tuple[int, ...]


@dataclass
class SlabObjective:
    """SlabNet: squared error of the mean over linear's, and a proper score of pairs of members over linear's error."""

    cubes: Cubes
    held_out: list[TrainingVolume]
    sizes: Sizes
    chances: Augment
    members_weight: float = 0.2
    members_loss: str = "crps"

    def batch(self, rng: np.random.Generator, step: int) -> list[Crop]:
        volume = self.cubes.choose(rng, step)
        fitting = [factor for factor in self.sizes.factors if volume.axes_for(factor)]
        factor = int(rng.choice(fitting))
        crops = [
            random_crop(rng, volume, factor, self.sizes.planes, self.sizes.patch, self.chances.thickness)
            for _ in range(self.sizes.batch)
        ]
        depth = min(len(crop.truth) for crop in crops)  # where axes differ in length
        return [augment(rng, _shortened(crop, depth), self.chances) for crop in crops]

    def loss(
        self, net: SlabNet, batch: list[Crop], generator: torch.Generator, stochastic: bool
    ) -> tuple[Tensor, dict[str, float]]:
        device = next(net.parameters()).device
        features, truth, t, hidden, gap = batch_tensors(batch, device)
        known = torch.from_numpy(np.stack([crop.known for crop in batch])).to(device)[:, None, hidden]
        weight = None if bool((known == 1).all()) else known
        mean, fine, coarse = net.trunk(features, t, gap)
        target, guess, plain = truth[:, :, hidden], mean[:, :, hidden], features[:, :1, hidden]
        loss = squared_error_ratio(guess, target, plain, weight)
        parts = {"mse": loss.item()}
        if stochastic:
            gates = net.gates(fine, coarse)
            shape = (len(batch), 2, *truth.shape[2:])
            # The mean is left alone by this part: it has its own, better, objective.
            base = guess.detach()
            members = [
                base + net.spread(gates, torch.randn(shape, generator=generator).to(device))[:, :, hidden]
                for _ in range(2)
            ]
            scale = average((plain - target).abs(), weight) + 1e-3
            if self.members_loss == "energy":
                mask = 1.0 if weight is None else weight
                score = energy_score(members[0] * mask, members[1] * mask, target * mask) / scale
            else:
                score = multiscale_crps(members[0], members[1], target, weight=weight) / scale
            loss = loss + self.members_weight * score
            parts[self.members_loss] = score.item()
        return loss, parts

    def score(self, net: SlabNet) -> dict[str, float]:
        """Over all held-out volumes and the axes that may play z: gains at each factor, and the members' CRPS."""
        scores: dict[str, list[float]] = {}
        for factor, turned in self.scored():
            for name, value in hidden_scores(net, turned, factor).items():
                scores.setdefault(name, []).append(value)
                scores.setdefault(f"{name}_x{factor}", []).append(value)
        return {name: float(np.mean(values)) for name, values in scores.items()}

    def scored(self) -> list[tuple[int, TrainingVolume]]:
        """(factor, volume turned) of the scores: those in which something hidden was measured."""
        return [
            (factor, turned)
            for factor in sorted(set(SCORED) & set(self.sizes.factors)) or self.sizes.factors[:1]
            for volume in self.held_out
            for turned in orientations(_corner(volume), 2 * factor)
            if turned.known[np.arange(len(turned.known)) % factor != 0].any()
        ]

    def picture(self, net: SlabNet) -> FloatArray:
        volume = _corner(max(self.held_out, key=lambda held: held.greys.size))
        factor = self.sizes.factors[len(self.sizes.factors) // 2]
        (turned, *_) = [*orientations(volume, factor), volume]
        sections = turned.greys[::factor]
        mean, _ = predict_volume(net, sections, factor)
        row = mean.shape[1] // 2
        both = [linear(sections, factor)[:, row], mean[:, row], turned.greys[: len(mean), row]]
        return np.concatenate(both, axis=1)

    @property
    def lacking(self) -> bool:
        return self.cubes.lacking

    def set_teacher(self, net: SlabNet, stochastic: bool) -> None:
        def fill(volume: TrainingVolume, factor: int) -> TrainingVolume:
            return refill(net, volume, factor, torch.Generator().manual_seed(factor) if stochastic else None)

        self.cubes.set_refill(fill)


def _corner(volume: TrainingVolume) -> TrainingVolume:
    return volume.part((slice(SCORED_SIDE),) * 3)


def orientations(volume: TrainingVolume, extent: int) -> list[TrainingVolume]:
    """The volume with each axis that may play z, and is longer than ``extent``, first."""
    return [volume.turned((axis, *(a for a in range(3) if a != axis))) for axis in volume.axes_for(extent)]


def hidden_scores(net: SlabNet, turned: TrainingVolume, factor: int) -> dict[str, float]:
    """Scores of the planes between every ``factor``-th, where they were measured."""
    sections = turned.greys[::factor]
    mean, members = predict_volume(net, sections, factor, torch.Generator().manual_seed(0), 2)
    plain, truth = linear(sections, factor), turned.greys[: len(mean)]
    hidden = np.arange(len(mean)) % factor != 0
    known = turned.measured[: len(mean)][hidden] > 0
    guess, other, true = (image[hidden][known] for image in (mean, plain, truth))
    result = {
        "gain_db": psnr(guess, true, RANGE) - psnr(other, true, RANGE),
        "psnr": psnr(guess, true, RANGE),
        "crps": fair_crps(members[:, hidden][:, known], true),
    }
    if known.all() and min(mean.shape[1:]) >= 7:
        result["gain_ssim"] = ssim(mean[hidden], truth[hidden], RANGE) - ssim(plain[hidden], truth[hidden], RANGE)
    return result


def _shortened(crop: Crop, depth: int) -> Crop:
    if len(crop.truth) == depth:
        return crop
    gaps = int((depth - 1) / crop.gap)
    return replace(
        crop,
        sections=crop.sections[: gaps + 4],
        truth=crop.truth[:depth],
        index=crop.index[:depth],
        t=crop.t[:depth],
        hidden=crop.hidden[:depth],
        known=crop.known[:depth],
    )


def batch_tensors(crops: Sequence[Crop], device: Any = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """-> features [n, 5, z, y, x], truth [n, 1, z, y, x], t [z], hidden [z], gap."""
    first = crops[0]
    sections = torch.from_numpy(np.stack([crop.sections for crop in crops])).to(device)
    truth = torch.from_numpy(np.stack([crop.truth for crop in crops])).to(device)[:, None]
    t = torch.from_numpy(first.t).to(device)
    features = slab_features(sections, torch.from_numpy(first.index).to(device), t)
    return features, truth, t, torch.from_numpy(first.hidden).to(device), first.gap


@dataclass(frozen=True)
class Planes:
    """condition [n, c, y, x], target [n, 1, y, x], index [n] of the plane or None, baseline [n, 1, y, x]."""

    condition: Tensor
    target: Tensor
    index: Tensor | None
    baseline: Tensor


@dataclass
class DiffusionObjective:
    """The published U-Net: the noise in a noisy plane, given its condition, at a level of noise drawn as published.

    draw: a generator of planes to train on; held_out: planes to score.
    """

    draw: Callable[[np.random.Generator, int], Planes]
    held_out: Callable[[], Planes]
    difficulty: bool = False
    lacking: bool = False

    def set_teacher(self, net: UNet, stochastic: bool) -> None:
        raise AssertionError("pairs and coarse planes lack nothing")

    def batch(self, rng: np.random.Generator, step: int) -> Planes:
        return self.draw(rng, step)

    def loss(
        self, net: UNet, batch: Planes, generator: torch.Generator, stochastic: bool
    ) -> tuple[Tensor, dict[str, float]]:
        device = next(net.parameters()).device
        gamma = draw_gammas(len(batch.target), generator)
        noise = torch.randn(batch.target.shape, generator=generator)
        level = gamma[:, None, None, None]
        noisy = level.sqrt() * batch.target + (1 - level).sqrt() * noise
        inputs = torch.cat([batch.condition, noisy], dim=1).to(device)
        index = None if batch.index is None else batch.index.to(device)
        features = net.features(inputs, gamma.to(device), index)
        estimate, noise = net.out(features), noise.to(device)
        plain = epsilon_error(estimate, noise)
        parts = {"epsilon": plain.item()}
        if not self.difficulty or net.out_difficulty is None:
            return plain, parts
        loss = difficulty_weighted(estimate, noise, net.out_difficulty(features))
        return loss, parts | {"difficulty": loss.item()}

    def score(self, net: UNet) -> dict[str, float]:
        planes, guess = self._restored(net)
        truth, plain = planes.target.numpy(), planes.baseline.numpy()
        gain = psnr(guess, truth, RANGE) - psnr(plain, truth, RANGE)
        return {"gain_db": gain, "psnr": psnr(guess, truth, RANGE)}

    def picture(self, net: UNet) -> FloatArray:
        planes, guess = self._restored(net)
        return np.concatenate([planes.baseline[0, 0].numpy(), guess[0, 0], planes.target[0, 0].numpy()], axis=1)

    def _restored(self, net: UNet) -> tuple[Planes, FloatArray]:
        """Ten solver steps, two members averaged."""
        planes, device = self.held_out(), next(net.parameters()).device
        generator = torch.Generator().manual_seed(0)
        condition = planes.condition.to(device)
        index = None if planes.index is None else planes.index.to(device)

        def denoise(y: Tensor, gamma: float) -> Tensor:
            level = torch.full((len(y),), gamma, device=device)
            return net(torch.cat([condition, y], dim=1), level, index)  # type: ignore[no-any-return]

        def noise(step: int) -> Tensor:
            return torch.randn(planes.target.shape, generator=generator).to(device)

        with torch.inference_mode():
            members = [dpm_solver_2m(denoise, noise, uniform_log_snr(10)).cpu() for _ in range(2)]
        return planes, torch.stack(members).mean(0).numpy()


def draw_gammas(count: int, generator: torch.Generator) -> Tensor:
    """As published: a step uniform on 1..T-1, then uniform between its gamma and the one before."""
    gammas = torch.tensor(published_train().gammas)
    step = torch.randint(1, len(gammas), (count,), generator=generator)
    share = torch.rand(count, generator=generator)
    return gammas[step] + share * (gammas[step - 1] - gammas[step])


def plane_batch(crops: Sequence[Crop], rng: np.random.Generator, blur: float) -> Planes:
    """One hidden plane of each crop of one gap. The published blur: radius 3 of the condition, each section apart."""
    conditions, targets, indices, baselines = [], [], [], []
    for crop in crops:
        plane = int(rng.integers(1, int(crop.gap)))
        low, high = crop.sections[1], crop.sections[2]
        t = np.float32(plane / crop.gap)
        pair = [gaussian_filter(s, 3.0) if rng.random() < blur else s for s in (high, low)]  # the higher z first
        conditions.append(np.stack(pair))
        targets.append(crop.truth[plane][None])
        baselines.append((low + t * (high - low))[None])
        indices.append(plane - 1)
    condition, target, baseline = (torch.from_numpy(np.stack(x)) for x in (conditions, targets, baselines))
    return Planes(condition, target, torch.tensor(indices), baseline)


def vem_objective(
    cubes: Cubes, held_out: list[TrainingVolume], sizes: Sizes, chances: Augment, difficulty: bool
) -> DiffusionObjective:
    """vEMDiffuse with the published network, which knows one factor."""
    (factor,) = sizes.factors
    sharp = replace(chances, blur=0.0)  # the blur is the published one, of ``plane_batch``

    def draw(rng: np.random.Generator, step: int) -> Planes:
        volume = cubes.choose(rng, step)
        crops = [random_crop(rng, volume, factor, factor, sizes.patch) for _ in range(sizes.batch)]
        crops = [augment(rng, _shortened(crop, factor + 1), sharp) for crop in crops]
        return plane_batch(crops, rng, chances.blur)

    def held() -> Planes:
        rng = np.random.default_rng(0)
        crops = []
        for volume in held_out:
            for turned in orientations(volume, factor):
                side = min(sizes.patch, *(n // 8 * 8 for n in turned.greys.shape[1:]))
                crops.append(cut_crop(turned, factor, 0, 1, slice(0, side), slice(0, side)))
        side = min(crop.truth.shape[1] for crop in crops)
        return plane_batch([crop for crop in crops if crop.truth.shape[1] == side], rng, 0)

    return DiffusionObjective(draw, held, difficulty)


def pair_objective(
    pairs: list[Pair], held_out: list[Pair], sizes: Sizes, blur: float, difficulty: bool
) -> DiffusionObjective:
    """EMDiffuse-n and -r: the condition is the other image of the pair, brought to the target's pixels bilinearly."""
    chances = np.array([pair.weight for pair in pairs])

    def cut(pair: Pair, plane: int, top: int, left: int, side: int) -> tuple[FloatArray, FloatArray]:
        f = pair.factor
        condition = pair.condition[plane, top : top + side, left : left + side]
        target = pair.target[plane, top * f : (top + side) * f, left * f : (left + side) * f]
        return condition, target

    def make(parts: list[tuple[FloatArray, FloatArray]], factor: int) -> Planes:
        condition, target = (torch.from_numpy(np.stack(x))[:, None] for x in zip(*parts, strict=True))
        if factor > 1:
            condition = F.interpolate(condition, scale_factor=factor, mode="bilinear", align_corners=False)
        return Planes(condition, target, None, condition)

    def draw(rng: np.random.Generator, step: int) -> Planes:
        pair = pairs[int(rng.choice(len(pairs), p=chances / chances.sum()))]
        side = _side(pair, sizes.patch)
        parts = []
        for _ in range(sizes.batch):
            plane, top, left = pair.place(rng, side)
            condition, target = cut(pair, plane, top, left, side)
            turns, flip = int(rng.integers(4)), rng.random() < 0.5
            condition, target = (np.rot90(image, turns) for image in (condition, target))
            if flip:
                condition, target = condition[::-1], target[::-1]
            if rng.random() < blur:
                condition = gaussian_filter(condition, 3.0)
            parts.append((np.ascontiguousarray(condition), np.ascontiguousarray(target)))
        return make(parts, pair.factor)

    def held() -> Planes:
        pair = held_out[0]
        side = _side(pair, sizes.patch)
        width = pair.condition.shape[2]
        lefts = sorted({0, (width - side) // 2, width - side})
        return make([cut(pair, 0, 0, left, side) for left in lefts], pair.factor)

    return DiffusionObjective(draw, held, difficulty)


def _side(pair: Pair, patch: int) -> int:
    """Of a square patch of the condition, whose target's side is a multiple of 8."""
    _, height, width = pair.condition.shape
    return int(min(patch // pair.factor, height, width)) // 8 * 8
