"""The training loop of SlabNet.

Convention: a run is a folder with ``checkpoint.pt`` (tensors and plain numbers only) and ``log.jsonl``. Running the
same command again continues from the checkpoint. Every step draws from a generator keyed by (seed, step), so a
resumed run sees the crops an unbroken one would have seen. The learning rate warms up, stays, and falls linearly over
the last ``decay`` of the steps; the spread is trained from ``members_from`` of the steps on.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emdiffuse_vol.diffusion.losses import multiscale_crps, squared_error_ratio
from emdiffuse_vol.models.slab import SlabNet, slab_features
from emdiffuse_vol.training.crops import Crop, FloatArray, random_crop
from emdiffuse_vol.training.muon import Muon


@dataclass(frozen=True)
class FitSettings:
    """Everything that decides the weights, besides the data."""

    steps: int = 5000
    batch: int = 2
    planes: int = 24
    patch: int = 64
    factors: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    learning_rate: float = 1.5e-3
    warmup: int = 100
    decay: float = 0.35
    members_from: float = 0.3
    members_weight: float = 0.2
    clip: float = 1.0
    weight_decay: float = 1e-4
    seed: int = 0
    checkpoint_every: int = 200


def learning_rate(step: int, settings: FitSettings) -> float:
    rise = min(1.0, (step + 1) / settings.warmup)
    fall = (settings.steps - step) / (settings.decay * settings.steps)
    return settings.learning_rate * min(rise, 1.0, max(fall, 0.0))


def make_optimizers(net: SlabNet, settings: FitSettings) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions inside the network, AdamW for all else."""
    inner = [p for name, p in net.named_parameters() if p.ndim == 5 and "out" not in name]
    chosen = {id(p) for p in inner}
    rest = [p for p in net.parameters() if id(p) not in chosen]
    return [
        Muon(inner, settings.learning_rate, weight_decay=settings.weight_decay),
        torch.optim.AdamW(rest, settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.99)),
    ]


def batch_tensors(crops: Sequence[Crop]) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """-> features [n, 5, z, y, x], truth [n, 1, z, y, x], t [z], hidden [z], gap."""
    sections = torch.from_numpy(np.stack([crop.sections for crop in crops]))
    truth = torch.from_numpy(np.stack([crop.truth for crop in crops]))[:, None]
    first = crops[0]
    t = torch.from_numpy(first.t)
    features = slab_features(sections, torch.from_numpy(first.index), t)
    return features, truth, t, torch.from_numpy(first.hidden), first.gap


def training_loss(
    net: SlabNet, crops: Sequence[Crop], generator: torch.Generator | None, members_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Squared error of the mean over linear's, plus (with a generator) the members' score over linear's error."""
    features, truth, t, hidden, gap = batch_tensors(crops)
    mean, fine, coarse = net.trunk(features, t, gap)
    linear = features[:, :1]
    target, guess = truth[:, :, hidden], mean[:, :, hidden]
    loss = squared_error_ratio(guess, target, linear[:, :, hidden])
    parts = {"mse": loss.item()}
    if generator is not None:
        gates = net.gates(fine, coarse)
        shape = (len(crops), 2, *truth.shape[2:])
        # The mean is left alone by this part: it has its own, better, objective.
        base = guess.detach()
        members = [base + net.spread(gates, torch.randn(shape, generator=generator))[:, :, hidden] for _ in range(2)]
        scale = (linear[:, :, hidden] - target).abs().mean() + 1e-3
        crps = multiscale_crps(members[0], members[1], target) / scale
        loss = loss + members_weight * crps
        parts["crps"] = crps.item()
    return loss, parts


def fit(
    net: SlabNet,
    volumes: Sequence[FloatArray],
    settings: FitSettings,
    folder: Path,
    report: Callable[[dict[str, float]], None] = lambda row: None,
) -> SlabNet:
    """Train ``net`` on ``volumes`` ([z, y, x], normalised), resuming from ``folder`` where a checkpoint is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    optimizers = make_optimizers(net, settings)
    step = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["net"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = int(state["step"])
    started = time.perf_counter()
    while step < settings.steps:
        rng = np.random.default_rng((settings.seed, step))
        factor = int(rng.choice(settings.factors))
        volume = volumes[int(rng.integers(len(volumes)))]
        crops = [random_crop(rng, volume, factor, settings.planes, settings.patch) for _ in range(settings.batch)]
        stochastic = step >= settings.members_from * settings.steps
        generator = torch.Generator().manual_seed(int(rng.integers(2**62))) if stochastic else None
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
        net.zero_grad(set_to_none=True)
        loss, parts = training_loss(net, crops, generator, settings.members_weight)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), settings.clip))
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient is not finite at step {step}")
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        row = {"step": step, "factor": factor, "norm": norm, "seconds": time.perf_counter() - started, **parts}
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        report(row)
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            state = {
                "net": net.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "settings": asdict(settings),
            }
            torch.save(state, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
    return net
