"""The training loop, the same for every network and objective.

Convention: a run is a folder with ``checkpoint.pt`` (tensors and plain numbers only), ``log.jsonl``, and TensorBoard
events where that is installed. Running the same command again continues from the checkpoint; other settings than those
it was made with are refused. Every step draws from a generator keyed by (seed, step, rank), so a resumed run sees the
crops an unbroken one would have seen. Under ``torchrun`` each process takes a batch of its own, gradients are
averaged, and process 0 alone writes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from emdiffuse_vol.errors import BlockError, ConfigError
from emdiffuse_vol.reconstruct.device import Device
from emdiffuse_vol.training.muon import Muon
from emdiffuse_vol.training.objectives import Objective

Row = dict[str, float]
EMA_WARMUP = 10
TIMED = (5, 25)  # steps from which a time budget is turned into a number of steps


@dataclass(frozen=True)
class FitSettings:
    """Everything that decides the weights, besides the data and the objective.

    minutes: a time budget, which sets ``steps`` once the first steps are timed. schedule: "trapezoid" (warm-up, then
    constant, then linear fall over the last ``decay``) or "cosine". members_from: share of the steps after which the
    spread is trained. refill: shares of the steps at which the network so far fills what anisotropic stacks lack.
    ema: decay of the moving average of the weights, which is what is scored and kept.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    steps: int = 5000
    minutes: float | None = None
    learning_rate: float = 1.5e-3
    schedule: str = "trapezoid"
    warmup: int = 100
    decay: float = 0.35
    members_from: float = 0.5
    refill: tuple[float, ...] = (0.3, 0.5, 0.7, 0.85)
    optimizer: str = "muon"
    clip: float = 1.0
    weight_decay: float = 1e-4
    ema: float = 0.998
    seed: int = 0
    checkpoint_every: int = 100
    validate_every: int = 500

    def check(self) -> None:
        if self.steps < 1 or self.checkpoint_every < 1 or self.validate_every < 1:
            raise ConfigError("fit.steps, fit.checkpoint_every and fit.validate_every must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"fit.minutes is {self.minutes}; it must be above 0")
        positive = {name: getattr(self, name) for name in ("learning_rate", "warmup", "clip")}
        positive |= {"decay": self.decay} if self.schedule == "trapezoid" else {}
        for name, value in positive.items():
            if not value > 0:
                raise ConfigError(f"fit.{name} is {value}; it must be above 0")
        shares = [("ema", self.ema), ("members_from", self.members_from), *(("refill", share) for share in self.refill)]
        for name, value in shares:
            if not 0 <= value <= 1:
                raise ConfigError(f"fit.{name} is {value}; it must be from 0 to 1")
        if self.seed < 0 or self.weight_decay < 0:
            raise ConfigError("fit.seed and fit.weight_decay must not be below 0")
        if self.schedule not in ("trapezoid", "cosine"):
            raise ConfigError(f"fit.schedule {self.schedule!r} is unknown; choose trapezoid or cosine")
        if self.optimizer not in ("muon", "adamw"):
            raise ConfigError(f"fit.optimizer {self.optimizer!r} is unknown; choose muon or adamw")


@dataclass(frozen=True)
class Ranks:
    """This process among those of ``torchrun``; one of one without it."""

    rank: int = 0
    world: int = 1

    def mean_gradients(self, net: nn.Module) -> None:
        if self.world > 1:
            grads = [p.grad for p in net.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            torch.distributed.all_reduce(flat)
            start = 0
            for grad in grads:
                grad.copy_(flat[start : start + grad.numel()].view_as(grad) / self.world)
                start += grad.numel()

    def from_first(self, value: float) -> float:
        if self.world > 1:
            tensor = torch.tensor([value], dtype=torch.float64)
            torch.distributed.broadcast(tensor, 0)
            value = float(tensor)
        return value


def join_ranks(device: Device) -> tuple[Ranks, Device]:
    """What ``torchrun`` says in the environment: this process among the others, and the GPU that is its own."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(), device
    cuda = device.name.startswith("cuda")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if device.name == "cuda":
        device = Device(f"cuda:{os.environ['LOCAL_RANK']}", device.precision)
    return Ranks(torch.distributed.get_rank(), world), device


def learning_rate(step: int, settings: FitSettings, steps: int) -> float:
    rise = min(1.0, (step + 1) / settings.warmup)
    if settings.schedule == "cosine":
        return settings.learning_rate * rise * (1 + math.cos(math.pi * step / steps)) / 2
    fall = (steps - step) / (settings.decay * steps)
    return settings.learning_rate * min(rise, 1.0, max(fall, 0.0))


def make_optimizers(net: nn.Module, settings: FitSettings) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions inside the network, AdamW for all else; or AdamW for all."""
    inner = [p for name, p in net.named_parameters() if p.ndim >= 4 and "out" not in name]
    if settings.optimizer == "adamw":
        inner = []
    chosen = {id(p) for p in inner}
    rest = [p for p in net.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.99))
    ]
    if inner:
        optimizers.append(Muon(inner, settings.learning_rate, weight_decay=settings.weight_decay))
    return optimizers


class Run:
    """The state of a training run, and what moves it on by a step."""

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        settings: FitSettings,
        folder: Path,
        device: Device,
        ranks: Ranks | None = None,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        """recipe: what else decides the weights, as JSON values; like the settings, it must not change on the way."""
        settings.check()
        self.net, self.objective, self.settings, self.device = net.to(device.name), objective, settings, device
        self.folder, self.ranks, self.recipe = folder, ranks or Ranks(), _plain(recipe or {})
        self.ema = deepcopy(net).requires_grad_(False)
        self.optimizers = make_optimizers(net, settings)
        self.step, self.steps, self.seconds = 0, settings.steps, 0.0
        if settings.minutes is not None:
            self.steps = max(self.steps, TIMED[1] + 1)  # enough to be timed
        self.best = -math.inf
        self._timed = 0.0
        self.teacher: dict[str, Any] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "checkpoint.pt"
        if self.path.exists():
            self._load()

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    @property
    def stochastic(self) -> bool:
        return self.step >= self.settings.members_from * self.steps

    def advance(self) -> Row:
        """One step. Raises BlockError where the loss is no number any more."""
        started = time.perf_counter()
        if self._refill_due():
            self._make_teacher()
        rng = np.random.default_rng((self.settings.seed, self.step, self.ranks.rank))
        batch = self.objective.batch(rng, self.step)
        seed = int(rng.integers(2**62))
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed + 1)  # dropout, in the published network, knows no generator but the global one
        rate = learning_rate(self.step, self.settings, self.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        self.net.train()
        self.net.zero_grad(set_to_none=True)
        with self.device.autocast():
            loss, parts = self.objective.loss(self.net, batch, generator, self.stochastic)
        loss.backward()  # type: ignore[no-untyped-call]
        self.ranks.mean_gradients(self.net)
        norm = float(torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip))
        if not math.isfinite(norm):
            raise BlockError(
                f"the gradient is not finite at step {self.step}; lower fit.learning_rate, or look for voxels that are "
                f"no numbers; {self.path} holds the last good state"
            )
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self._average()
        self.seconds += time.perf_counter() - started
        self._budget()
        row = {"step": self.step, "rate": rate, "norm": norm, "seconds": self.seconds, **parts}
        if self.ranks.rank == 0:
            with (self.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        return row

    def save(self) -> None:
        """Whole or not at all. The settings decide what may continue from it."""
        if self.ranks.rank:
            return
        state = {
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "teacher": self.teacher,
            "step": self.step,
            "steps": self.steps,
            "seconds": self.seconds,
            "best": self.best,
            "timed": self._timed,
            "settings": _plain(asdict(self.settings)),
            "recipe": self.recipe,
        }
        partial = self.path.with_suffix(".tmp")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def score(self) -> Row:
        """Of the averaged weights on what was held out."""
        self.ema.eval()
        scores = self.objective.score(self.ema)
        if self.ranks.rank == 0:
            with (self.folder / "scores.jsonl").open("a") as log:
                log.write(json.dumps({"step": self.step, **scores}) + "\n")
        return scores

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True, map_location=self.device.name)
        asked = {f"fit.{name}": value for name, value in _plain(asdict(self.settings)).items()} | self.recipe
        made = {f"fit.{name}": value for name, value in state["settings"].items()} | state.get("recipe", {})
        for name in (name for name in asked if name in made and asked[name] != made[name]):
            raise ConfigError(
                f"{self.path} was made with other settings: {name} was {made[name]}, is now {asked[name]}; give them "
                f"back, or another --out"
            )
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.steps, self.seconds = int(state["step"]), int(state["steps"]), float(state["seconds"])
        self.best, self.teacher, self._timed = float(state["best"]), state["teacher"], float(state.get("timed", 0.0))
        for name in ("log.jsonl", "scores.jsonl"):
            self._cut_log(self.folder / name)
        if self.teacher is not None:
            self._teach()

    def _cut_log(self, log: Path) -> None:
        """Rows after the checkpoint are made again, and so is what a kill left of one."""
        if self.ranks.rank == 0 and log.exists():
            rows = [line for line in log.read_text().splitlines() if line.endswith("}")]
            kept = [row for row in rows if json.loads(row)["step"] <= self.step]
            partial = log.with_suffix(".tmp")
            partial.write_text("".join(row + "\n" for row in kept))
            os.replace(partial, log)

    def _average(self) -> None:
        """A moving average that forgets the first steps faster."""
        decay = min(self.settings.ema, (1 + self.step) / (EMA_WARMUP + self.step))
        with torch.no_grad():
            for average, value in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                average.lerp_(value, 1 - decay)

    def _budget(self) -> None:
        """Turn a time budget into a number of steps, once, when some have been timed."""
        first, last = TIMED
        if self.settings.minutes is None:
            return
        if self.step == first:
            self._timed = self.seconds
        if self.step == last:
            # Steps that train the spread too take about half as long again; where all do, they were timed.
            share = self.settings.members_from
            dearer = 1.5 - 0.5 * share if share else 1.0
            each = (self.seconds - self._timed) / (last - first) * dearer
            self.steps = max(last + 1, int(self.ranks.from_first(60 * self.settings.minutes / each)))

    def _refill_due(self) -> bool:
        steps = [round(share * self.steps) for share in self.settings.refill]
        return self.objective.lacking and self.step in steps

    def _make_teacher(self) -> None:
        # Where the spread is trained from the start, there was one to start from.
        stochastic = self.settings.members_from == 0 or self.step > self.settings.members_from * self.steps
        self.teacher = {"net": {k: v.clone() for k, v in self.ema.state_dict().items()}, "stochastic": stochastic}
        self._teach()

    def _teach(self) -> None:
        assert self.teacher is not None
        teacher = deepcopy(self.ema)
        teacher.load_state_dict(self.teacher["net"])
        self.objective.set_teacher(teacher.eval(), self.teacher["stochastic"])


def fit(
    run: Run,
    report: Callable[[Run, Row], None] = lambda run, row: None,
    on_scores: Callable[[Run, Row], None] = lambda run, scores: None,
) -> Row:
    """Take a run to its end. -> the last scores."""
    scores: Row = {}
    while not run.finished:
        report(run, run.advance())
        if (run.step % run.settings.validate_every == 0 or run.finished) and run.ranks.rank == 0:
            scores = run.score()
            on_scores(run, scores)
            if run.stochastic:  # before, members are noise
                run.best = max(run.best, scores["gain_db"])
        if run.step % run.settings.checkpoint_every == 0 or run.finished:
            run.save()
    return scores


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON would give it back."""
    values: dict[str, Any] = json.loads(json.dumps(settings))
    return values
