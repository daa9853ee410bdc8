"""What a SectionNet is trained to do, its score on what is held out, and its calibration.

Convention: batches are ``windows.Windows``. The mean is trained by the logarithm of its error, so that what counts is
a gain in dB, alike at every dwell time. ``gain_db`` is over the input, brought to the finer grid bilinearly where there
is one. Without a truth (FastScan-ss) errors are products of the differences to two pixels whose noise is independent,
(mean - a) (mean - b): their average is the squared error against what no one has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log10, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from emdiffuse_vol.diffusion.losses import dissimilarity, multiscale_crps
from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.metrics.image import psnr, ssim
from emdiffuse_vol.metrics.spread import Z90, fair_crps
from emdiffuse_vol.models.section import SectionNet
from emdiffuse_vol.training.calibrate import BLOCK, LEVEL, Calibration
from emdiffuse_vol.training.degrade import Limits, grey_limits
from emdiffuse_vol.training.sources import Cubes, Source, open_pair, open_source, partnered
from emdiffuse_vol.training.volumes import FloatArray
from emdiffuse_vol.training.windows import (
    SIDE,
    Draw,
    Shape,
    Windows,
    degraded,
    held_degraded,
    held_neighbours,
    held_pair,
    named_counts,
    neighbours,
    paired,
)

if TYPE_CHECKING:
    from emdiffuse_vol.training.train import Request

RANGE = 2.0  # of normalised greys
CONSISTENCY = 1.0  # weight of the term that keeps a pixel in its place, as a neighbour for a target does not
FLOOR = 1e-5  # of an error whose logarithm is taken
BATCH = 4  # windows computed at a time where no gradient is asked for


@dataclass
class RestoringObjective:
    """error: of the mean, pixel by pixel; structure: weight of 1 - SSIM beside it; held_out: a name for each part."""

    draw: Draw
    held_out: dict[str, Windows]
    error: Callable[[Tensor], Tensor] = torch.square
    structure: float = 0.0
    members_weight: float = 0.2
    lacking: bool = False

    def set_teacher(self, net: Any, stochastic: bool) -> None:
        raise AssertionError("windows lack nothing")

    def batch(self, rng: np.random.Generator, step: int) -> Windows:
        return self.draw(rng, step)

    def loss(
        self, net: SectionNet, batch: Windows, generator: torch.Generator, stochastic: bool
    ) -> tuple[Tensor, dict[str, float]]:
        device = next(net.parameters()).device
        sections, target = (torch.from_numpy(x).to(device) for x in (batch.sections, batch.target))
        mean, features = net.trunk(sections)
        error, grain = self.error(mean - target).mean(), torch.zeros_like(target)
        if batch.whole is not None:
            first, second = whole_cells(net, batch, device)
            # Not a loss of its own, which the input as it is would bring to nothing.
            error = error + CONSISTENCY * self.error(mean - target - first + second).mean()
            # What no network can know of the target is its noise: members are scored with noise of the same cell.
            assert batch.others is not None
            grain = torch.from_numpy(batch.others[:, :1] - batch.others[:, 1:]).to(device) / sqrt(2)
        loss = error.add(FLOOR).log()
        if self.structure:
            loss = loss + self.structure * dissimilarity(mean, target)
        parts = {"mean": loss.item()}
        if stochastic:
            # The mean is left alone by this part: it has its own, better, objective.
            base, shape = mean.detach(), (len(mean), 2, *mean.shape[2:])
            members = []
            for _ in range(2):
                noise = torch.randn(shape, generator=generator).to(device)
                by = torch.randint(1, 5, (2,), generator=generator).tolist()
                members.append(base + net.spread(features, noise) + grain.roll(by, (2, 3)))
            scale = (base - target).abs().mean() + 1e-3
            first, second, truth = (x[:, :, None] for x in (*members, target))
            score = multiscale_crps(first, second, truth) / scale
            loss = loss + self.members_weight * score
            parts["crps"] = score.item()
        return loss, parts

    def score(self, net: SectionNet) -> dict[str, float]:
        """Over all held-out parts, and of each where they are several: gains, and the members' CRPS."""
        scores: dict[str, list[float]] = {}
        for part, windows in self.held_out.items():
            for name, value in held_scores(net, windows).items():
                scores.setdefault(name, []).append(value)
                if len(self.held_out) > 1:
                    scores.setdefault(f"{name}_{part}", []).append(value)
        return {name: float(np.mean(values)) for name, values in scores.items()}

    def picture(self, net: SectionNet) -> FloatArray:
        windows = list(self.held_out.values())[len(self.held_out) // 2]
        one = Windows(windows.sections[:1], windows.target[:1])
        mean, _ = restore(net, one.sections, torch.Generator(), 0)
        return np.concatenate([plain(net, one.sections)[0, 0], mean[0, 0], one.target[0, 0]], axis=1)


def restoring(request: Request, net: SectionNet) -> RestoringObjective:
    """What a request of ``training.train`` asks for, its data opened. Raises our errors."""
    shape = Shape(request.batch, request.patch, net.context, net.factor, request.spacing, request.alone)
    if request.pairs:
        pairs = partnered(request.pairs)
        parts = [open_pair(pair, request.factor, request.held_out, measured=True) for pair in pairs]
        draw = paired([first for first, _ in parts], shape)
        names = [Path(pair.condition).stem for pair in pairs]
        held = {name: held_pair(held, shape) for name, (_, held) in zip(names, parts, strict=True)}
    else:
        opened = [open_source(entry, request.mode, request.held_out) for entry in request.volumes]
        for source in (source for both in opened for source in both):
            sectioned(source, shape.patch, SIDE * (2 if request.degradation is None else shape.factor))
        cubes = Cubes([first for first, _ in opened], request.fit.seed)
        seen = {Path(s.path).stem: held for s, (_, held) in zip(request.volumes, opened, strict=True)}
        if request.degradation is None:
            draw = neighbours(cubes, shape)
            held = {name: held_neighbours(source.whole, shape) for name, source in seen.items()}
        else:
            limits = widest([first for first, _ in opened])
            draw = degraded(cubes, request.degradation, limits, shape)
            held = {
                name if len(seen) == 1 else f"{volume}-{name}": held_degraded(
                    source.whole, request.degradation.read, limits, shape, counts
                )
                for volume, source in seen.items()
                for name, counts in named_counts(request.degradation).items()
            }
    # Of noisy targets the mean is sought; with absolute errors the second term lets the input pass for its own truth.
    scan = request.mode == "FastScan-s"
    structure = request.structure if scan else 0.0
    return RestoringObjective(draw, held, torch.abs if scan else torch.square, structure, request.members_weight)


def sectioned(source: Source, patch: int, least: int) -> None:
    """A volume thinner than a patch is seen section by section, never across. Raises ConfigError."""
    _, height, width = source.region.shape
    if min(source.region.shape) < patch:
        source.axes = (0,)
    if min(height, width) < least:
        raise ConfigError(
            f"{source.region} is what there is to train on, or what is held out of it; at least {least} pixels along y "
            f"and x are needed, so give more, or another held_out"
        )


def widest(sources: list[Source]) -> Limits:
    """Of the data types of all sources."""
    lows, highs = zip(*(grey_limits(source.greys, source.volume.spec.dtype) for source in sources), strict=True)
    return min(lows), max(highs)


def whole_cells(net: SectionNet, batch: Windows, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the network makes of whole sections at the pixels that were input and target: [n, 1, y, x] each."""
    assert batch.whole is not None and batch.chosen is not None
    with torch.no_grad():
        restored = F.pixel_unshuffle(net(torch.from_numpy(batch.whole).to(device)), 2)
        picked = restored.gather(1, torch.from_numpy(batch.chosen[:, :2]).to(device))
    return picked[:, :1], picked[:, 1:]


def plain(net: SectionNet, sections: FloatArray) -> FloatArray:
    """The middle section on the grid of the output: [n, 1, Y, X]."""
    middle = torch.from_numpy(sections[:, net.context, None])
    if net.factor > 1:
        middle = F.interpolate(middle, scale_factor=net.factor, mode="bilinear", align_corners=False)
    return middle.numpy()


def restore(
    net: SectionNet, sections: FloatArray, generator: torch.Generator, members: int
) -> tuple[FloatArray, FloatArray]:
    """[n, w, y, x] -> mean [n, 1, Y, X] and members [k, n, 1, Y, X], in memory; what users run is ``reconstruct``."""
    device = next(net.parameters()).device
    means, spreads = [], []
    with torch.inference_mode():
        for start in range(0, len(sections), BATCH):
            mean, features = net.trunk(torch.from_numpy(sections[start : start + BATCH]).to(device))
            shape = (len(mean), 2, *mean.shape[2:])
            drawn = [torch.randn(shape, generator=generator).to(device) for _ in range(members)]
            means.append(mean.cpu().numpy())
            spreads.append(np.stack([(mean + net.spread(features, n)).cpu().numpy() for n in drawn] or [means[-1]]))
    return np.concatenate(means), np.concatenate(spreads, axis=1)[:members]


def held_scores(net: SectionNet, windows: Windows) -> dict[str, float]:
    mean, members = restore(net, windows.sections, torch.Generator().manual_seed(0), 2)
    before, truth = plain(net, windows.sections), windows.target
    if windows.others is not None:
        error, noise = (float(np.mean((x - truth) * (x - windows.others[:, :1]))) for x in (mean, before))
        return {"gain_db": 10 * log10(max(noise, 1e-9) / max(error, 1e-9)), "error": error}
    flat = [image[:, 0] for image in (mean, before, truth)]
    return {
        "gain_db": psnr(mean, truth, RANGE) - psnr(before, truth, RANGE),
        "psnr": psnr(mean, truth, RANGE),
        "gain_ssim": ssim(flat[0], flat[2], RANGE) - ssim(flat[1], flat[2], RANGE),
        "crps": fair_crps(members, truth),
    }


def calibrate_sections(net: SectionNet, held_out: dict[str, Windows], members: int = 4) -> Calibration:
    """One scale of the spread for all parts together, in the place of a gap the factor. It is fitted on the upper
    half of the rows of each part and measured on the lower. With a truth as in ``calibrate``; without, the scale makes
    the mean square of the spread that of the error, and there is no coverage to measure."""
    key = str(net.factor)
    fitted, measured = [], []
    for windows in held_out.values():
        mean, drawn = restore(net, windows.sections, torch.Generator().manual_seed(0), members)
        spread, truth = drawn.std(axis=0, ddof=1), windows.target
        half = spread.shape[2] // 2
        others = windows.others
        error = np.abs(mean - truth) if others is None else (mean - truth) * (mean - others[:, :1])
        fitted.append((error[:, :, :half], spread[:, :, :half]))
        measured.append((error[:, :, half:], spread[:, :, half:]))
    if any(windows.others is not None for windows in held_out.values()):
        error, spread = (np.concatenate([pair[k].ravel() for pair in fitted + measured]) for k in (0, 1))
        found = sqrt(max(float(error.mean()), 0.0) / max(float(np.square(spread).mean()), 1e-12))
        return Calibration({key: round(found, 4)}, members=members)
    ratio = np.concatenate([(error / (Z90 * np.maximum(spread, 1e-6))).ravel() for error, spread in fitted])
    scale = round(float(np.quantile(ratio, LEVEL)), 4)
    inside = [(error <= Z90 * scale * spread).ravel() for error, spread in measured]
    blocks = [b.mean() for part in inside for b in np.array_split(part, max(1, part.size // BLOCK**2))]
    covered, scatter = float(np.mean(np.concatenate(inside))), float(np.std(blocks))
    return Calibration({key: scale}, {key: round(covered, 4)}, {key: round(scatter, 4)}, members)
