"""A training run, from what was asked to a weights file with its card.

    train     request -> weights: opens the data, builds or loads the network, fits, calibrates, writes
    Request   the keys of the JSON configuration

The run's folder holds ``checkpoint.pt`` to continue from, ``log.jsonl`` (every step), ``scores.jsonl`` (every
validation), TensorBoard events, ``best.safetensors`` and ``last.safetensors``, and at the end ``NAME.safetensors`` with
its card ``NAME.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emdiffuse_vol import __version__
from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.models.checkpoints import MODELS, load_weights, save_weights
from emdiffuse_vol.models.section import SectionNet
from emdiffuse_vol.models.slab import SlabNet
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.reconstruct.device import choose_device
from emdiffuse_vol.reconstruct.greys import dtype_greys
from emdiffuse_vol.training.augment import Augment
from emdiffuse_vol.training.calibrate import Calibration, HeldOut, calibrate
from emdiffuse_vol.training.degrade import Degradation
from emdiffuse_vol.training.fit import FitSettings, Row, Run, fit, join_ranks
from emdiffuse_vol.training.objectives import (
    Objective,
    Sizes,
    SlabObjective,
    orientations,
    pair_objective,
    vem_objective,
)
from emdiffuse_vol.training.restoring import RestoringObjective, calibrate_sections, restoring
from emdiffuse_vol.training.sources import (
    VOLUMES,
    Cubes,
    PairSource,
    Source,
    VolumeSource,
    open_pair,
    open_source,
    partnered,
)
from emdiffuse_vol.training.volumes import refill

SECTIONS = ("EMDiffuse-n", "EMDiffuse-r", "FastScan-s", "FastScan-ss")
GAPS = (4, 5, 6, 8, 10)  # calibrated, where they were trained
REACH = (0.75, 7 / 6)  # gaps accepted beside those trained: a quarter below the least, a sixth above the greatest
EVERY = 10  # steps between scalars
HELD_OUT = 256  # voxels along each axis of the isotropic grid, at most, that are scored and calibrated on


@dataclass(frozen=True)
class Request:
    """Keys of the JSON configuration of ``emdvol train``.

    start_from: weights to begin with, instead of a new network. network: architecture and its arguments. held_out: the
    share of each volume (the end of its x axis; of pairs, of the rows) that is never trained on, but scored and
    calibrated on. factors: distances of sections in lateral pixels; the published networks take one. factor: of
    EMDiffuse-r. degradation: of clean volumes, for modes that restore sections and are given no pairs. spacing: of
    neighbouring sections in planes of such a volume, drawn evenly; alone: probability that a section is shown without
    neighbours, as a single image has none. structure: of FastScan-s, weight of 1 - SSIM beside the L1 error. data:
    words on where the data come from and their licence, for the card.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    mode: str
    out: str
    name: str | None = None
    volumes: tuple[VolumeSource, ...] = ()
    pairs: tuple[PairSource, ...] = ()
    start_from: str | None = None
    network: dict[str, Any] = field(default_factory=lambda: {"architecture": "slab"})
    held_out: float = 0.16
    factors: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    factor: int = 1
    degradation: Degradation | None = None
    spacing: tuple[int, ...] = (1,)
    alone: float = 0.1
    structure: float = 0.2
    batch: int = 2
    planes: int = 24
    patch: int = 64
    members_weight: float = 0.2
    members_loss: str = "crps"
    difficulty: bool = False
    augment: Augment = field(default_factory=Augment)
    fit: FitSettings = field(default_factory=FitSettings)
    device: str = "auto"
    precision: str = "auto"
    data: str = "not stated"
    licence: str = "not stated"


Notify = Callable[[Run, Row], None]


def train(request: Request, notify: Notify = lambda run, row: None) -> Path:
    """-> the weights file. Running the same request again continues it. Raises our errors."""
    check(request)
    net, architecture, arguments = network(request)
    ranks, device = join_ranks(choose_device(request.device, request.precision, exact=isinstance(net, UNet)))
    objective, held_out = prepare(request, net)
    folder = Path(request.out)
    run = Run(net, objective, request.fit, folder, device, ranks, recipe(request))
    name = request.name or folder.resolve().name
    facts = {
        "architecture": architecture,
        "config": arguments,
        "modes": [request.mode],
        "name": name,
        "greys": "dtype" if isinstance(net, UNet) else "percentiles",
        **({"gaps": gaps(request, net)} if request.mode in VOLUMES else {}),
        **({"factor": net.factor} if isinstance(net, SectionNet) and net.factor > 1 else {}),
    }
    board = open_board(folder, run.step) if ranks.rank == 0 else None

    def report(run: Run, row: Row) -> None:
        if board is not None and run.step % EVERY == 0:
            for key in row.keys() - {"step"}:
                board.add_scalar(f"train/{key}", row[key], run.step)
        notify(run, row)

    def on_scores(run: Run, scores: Row) -> None:
        training = provenance(request, run, scores)
        for file in ["last.safetensors", *(["best.safetensors"] if scores["gain_db"] >= run.best else [])]:
            save_weights(folder / file, run.ema, **facts, training=training)  # type: ignore[arg-type]
        if board is not None:
            for key, value in scores.items():
                board.add_scalar(f"held out/{key}", value, run.step)
            picture = (run.objective.picture(run.ema).clip(-1, 1) + 1) / 2
            board.add_image("held out", picture[None], run.step)
            board.flush()

    scores = fit(run, report, on_scores)
    path = folder / f"{name}.safetensors"
    if ranks.rank == 0:
        calibration = None
        if isinstance(net, SlabNet):
            save_weights(path, run.ema, **facts)  # type: ignore[arg-type]
            calibration = calibrated(request, path, unseen(run.ema, held_out))  # type: ignore[arg-type]
        if isinstance(objective, RestoringObjective):
            calibration = calibrate_sections(run.ema, objective.held_out)  # type: ignore[arg-type]
        extra = {"calibration": asdict(calibration)} if calibration and calibration.scale else {}
        scores = scores or run.score()
        save_weights(path, run.ema, **facts, **extra, training=provenance(request, run, scores))  # type: ignore[arg-type]
        path.with_suffix(".md").write_text(card(request, run, name, scores, calibration))
    return path


def check(request: Request) -> None:
    """Everything in the request that can be wrong on its own."""
    if request.mode not in (*VOLUMES, *SECTIONS):
        raise ConfigError(f"mode {request.mode!r} is unknown; choose one of {', '.join((*VOLUMES, *SECTIONS))}")
    check_data(request)
    if request.members_loss not in ("crps", "energy"):
        raise ConfigError(f"members_loss {request.members_loss!r} is unknown; choose crps or energy")
    if not request.factors or min(request.factors) < 2:
        raise ConfigError(f"factors are {list(request.factors)}; at least one is needed, each 2 or more")
    if request.factor < 1 or (request.factor > 1 and request.mode != "EMDiffuse-r"):
        raise ConfigError(f"factor is {request.factor}; of EMDiffuse-r it is at least 1, and no other mode has one")
    if not request.spacing or min(request.spacing) < 1 or not 0 <= request.alone <= 0.5 or request.structure < 0:
        raise ConfigError("every spacing must be at least 1, alone be from 0 to 0.5, and structure not be below 0")
    if request.batch < 1 or request.planes < 2 or request.patch < 8 * request.factor:
        raise ConfigError(f"batch must be at least 1, planes at least 2, patch at least {8 * request.factor}")
    if request.name and ("/" in request.name or request.name in (".", "..")):
        raise ConfigError(f"name is {request.name!r}; it names a file in the folder {request.out}")
    request.fit.check()


def check_data(request: Request) -> None:
    """Each mode learns from data of its own kind."""
    alone = request.mode in VOLUMES or request.mode == "FastScan-ss"
    if alone and (not request.volumes or request.pairs or request.degradation):
        raise ConfigError(f"mode {request.mode} learns from volumes; give volumes, and no pairs or degradation")
    if not alone and bool(request.volumes) == bool(request.pairs):
        raise ConfigError(
            f"mode {request.mode} learns from registered pairs, or from clean volumes that are degraded; give either"
        )
    if not alone and bool(request.volumes) != bool(request.degradation):
        raise ConfigError("degradation says how clean volumes are made worse; give it with volumes, and not with pairs")
    if request.degradation:
        request.degradation.check()
    if request.mode == "EMDiffuse-r" and request.volumes and request.factor < 2:
        raise ConfigError(f"factor is {request.factor}; EMDiffuse-r learns from clean volumes at a factor of 2 or more")


def network(request: Request) -> tuple[nn.Module, str, dict[str, Any]]:
    """The network to train, new or from weights. Raises ConfigError and WeightsError."""
    slab_mode = request.mode in VOLUMES
    if request.start_from is not None:
        weights = load_weights(request.start_from)
        if request.mode not in weights.metadata["modes"] and not (
            slab_mode and set(VOLUMES) & set(weights.metadata["modes"])
        ):
            served = ", ".join(weights.metadata["modes"])
            raise ConfigError(f"start_from {request.start_from} serves {served}; choose weights for {request.mode}")
        if request.difficulty and getattr(weights.net, "out_difficulty", None) is None:
            raise ConfigError(
                f"difficulty needs a second head, and {request.start_from} has none; leave one of them out"
            )
        if isinstance(weights.net, SectionNet) and weights.net.factor != request.factor:
            raise ConfigError(f"start_from {request.start_from} serves factor {weights.net.factor}; set factor to it")
        if isinstance(weights.net, UNet) and request.mode in SECTIONS and request.volumes:
            raise ConfigError(f"start_from {request.start_from} is the published network, which learns from pairs")
        return weights.net.requires_grad_(True), weights.architecture, weights.config
    arguments = dict(request.network)
    architecture = arguments.pop("architecture", None)
    allowed: tuple[str, ...] = ("slab", "plane", "unet-vem") if slab_mode else ("section",)
    if request.mode.startswith("EMDiffuse") and request.pairs:
        allowed = ("section", "unet-2d")
    if architecture not in allowed:
        raise ConfigError(f"network.architecture is {architecture!r}; mode {request.mode} takes {', '.join(allowed)}")
    if request.difficulty:
        if not architecture.startswith("unet"):
            raise ConfigError(f"difficulty is of the published networks; network.architecture is {architecture}")
        arguments["difficulty"] = True
    if architecture == "section":
        arguments["factor"] = request.factor
    torch.manual_seed(request.fit.seed)
    try:
        if int(arguments.get("width", 2)) % 2:
            raise ValueError("width must be even")
        net = MODELS[architecture](**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"network {request.network}: {error}") from None
    return net, architecture, arguments


def prepare(request: Request, net: nn.Module) -> tuple[Objective, list[Source]]:
    """Open the data. -> the objective, and the held-out parts of volumes."""
    sizes = Sizes(request.batch, request.planes, request.patch, request.factors)
    if isinstance(net, SectionNet):
        return restoring(request, net), []
    if request.pairs:
        parts = [open_pair(pair, request.factor, request.held_out) for pair in partnered(request.pairs)]
        train_on, held = [first for first, _ in parts], [second for _, second in parts]
        return pair_objective(train_on, held, sizes, request.augment.blur, request.difficulty), []
    published = isinstance(net, UNet)
    if published and len(request.factors) != 1:
        raise ConfigError(f"the published network knows one factor, not {list(request.factors)}; give one in factors")
    coarse = request.patch if published else None
    opened = [open_source(entry, request.mode, request.held_out, coarse) for entry in request.volumes]
    sources, held_out = [first for first, _ in opened], [limited(second) for _, second in opened]
    if published:
        for source in (*sources, *held_out):
            source.greys = dtype_greys(source.volume.spec.dtype)
    least = min(request.factors)
    for entry, source in zip(request.volumes, sources, strict=True):
        if not source_fits(source, least):
            raise ConfigError(f"{entry.path} is not long enough to hide planes between sections {least} pixels apart")
    cubes = Cubes(sources, request.fit.seed)
    seen = [source.whole for source in held_out]
    if published:
        scored = any(orientations(volume, least) for volume in seen)
        objective: Objective = vem_objective(cubes, seen, sizes, request.augment, request.difficulty)
    else:
        slabs = SlabObjective(cubes, seen, sizes, request.augment, request.members_weight, request.members_loss)
        objective, scored = slabs, bool(slabs.scored())
    if not scored:
        raise ConfigError(
            f"held_out is {request.held_out:g}, and no volume has a part there that is long enough, and in its mask, "
            f"to be scored; hold more out, or train smaller factors"
        )
    empty = [e for e, s in zip(request.volumes, sources, strict=True) if s.mask and s.small and not s.whole.known.any()]
    if empty:
        raise ConfigError(f"mask {empty[0].mask} leaves nothing of {empty[0].path} to train on")
    return objective, held_out


def source_fits(source: Source, factor: int) -> bool:
    z, y, x = source.region.shape
    return max(y, x) > factor if source.factor else max(z, y, x) > factor


def limited(source: Source) -> Source:
    """What is held out, of a large volume no more than is needed."""
    start = source.region.start
    most = (HELD_OUT // (source.factor or 1) + 1, HELD_OUT, HELD_OUT)
    z, y, x = (a + min(n, m) for a, n, m in zip(start, source.region.shape, most, strict=True))
    return replace(source, region=Box(start, (z, y, x)))


def gaps(request: Request, net: nn.Module) -> list[float]:
    if isinstance(net, UNet):
        return [float(request.factors[0])] * 2
    return [round(REACH[0] * min(request.factors), 2), round(REACH[1] * max(request.factors), 2)]


def unseen(net: SlabNet, held_out: list[Source]) -> list[HeldOut]:
    """What was held out, unknown rows filled by ``net``."""
    parts = []
    for source in held_out:
        volume = source.whole
        if source.factor is not None:
            volume = refill(net, volume, source.factor, torch.Generator().manual_seed(0))
        parts.append(HeldOut(volume, source.greys, source.volume.spec.dtype))
    return parts


def calibrated(request: Request, path: Path, parts: list[HeldOut], gaps: tuple[int, ...] = GAPS) -> Calibration:
    """Of the weights in ``path``: fitted on one half of each part, measured on the other."""
    halves = [part.halves() for part in parts]
    trained = tuple(gap for gap in gaps if min(request.factors) <= gap <= max(request.factors))
    fitted, measured = [first for first, _ in halves], [second for _, second in halves]
    settings: dict[str, Any] = {"mode": request.mode, "device": request.device, "precision": request.precision}
    return calibrate(str(path), fitted, measured, trained or request.factors[:1], **settings)


def recipe(request: Request) -> dict[str, Any]:
    """What decides the weights, besides ``fit``."""
    free = ("out", "name", "fit", "device", "precision", "data", "licence")
    return {key: value for key, value in asdict(request).items() if key not in free}


def provenance(request: Request, run: Run, scores: Row) -> dict[str, Any]:
    return {
        "data": request.data,
        "licence": request.licence,
        "held_out": f"the last {request.held_out:g} of the x axis (of pairs: of the rows)",
        "start_from": request.start_from,
        "steps": run.step,
        "seconds": round(run.seconds),
        "scores_held_out": {key: round(value, 4) for key, value in scores.items()},
        "settings": {
            key: value
            for key, value in asdict(request).items()
            if key not in ("volumes", "pairs", "out", "name", "data", "licence", "start_from", "device")
        },
        "software": {"emdiffuse_vol": __version__, "torch": str(torch.__version__)},
    }


def card(request: Request, run: Run, name: str, scores: Row, calibration: Calibration | None) -> str:
    """The model card, Markdown."""
    parameters = sum(p.numel() for p in run.net.parameters())
    start = f"started from `{request.start_from}`" if request.start_from else "from a new network"
    asked = f"factors {', '.join(map(str, request.factors))}" if request.mode in VOLUMES else recipe_of(request)
    lines = [
        f"# {name}",
        "",
        f"Weights for {request.mode}, written by `emdvol train` ({__version__}).",
        "",
        f"**What it is.** `{type(run.net).__name__}`, {parameters:,} parameters, float32.",
        "",
        f"**Data.** {request.data} Licence: {request.licence}",
        "",
        f"**Recipe.** {run.step:,} steps of {request.batch} crops of about {request.patch} pixels {start}; {asked}; "
        f"{run.seconds / 60:.0f} minutes. All settings are in the file's header (`emdvol models show {name}`).",
        "",
        f"**Scores on the held-out part** (the last {request.held_out:.0%} of the x axis; of pairs, of the rows):",
        "",
        "| score | value |",
        "|---|---|",
        *(f"| {key} | {value:.3f} |" for key, value in sorted(scores.items())),
    ]
    if calibration and calibration.scale:
        lines += [
            "",
            *(calibration_table(request.mode, calibration) if calibration.coverage else (CALIBRATED_BLIND,)),
        ]
    lines += [
        "",
        "**Limits.** Trained on the data named above alone: on other tissue, staining or noise the mean gains less and "
        "the calibration is not guaranteed. Compare with withheld sections before trusting it.",
        "",
    ]
    return "\n".join(lines)


CALIBRATED_BLIND = (
    "**Calibration** without a truth: the mean square of the spread was made that of the error, which two pixels of a "
    "cell with independent noise tell. How often the interval holds was not measured."
)


def calibration_table(mode: str, calibration: Calibration) -> list[str]:
    return [
        "**Calibration** of the 90 % interval, fitted on one half of the held-out part and measured on the other:",
        "",
        f"| {'gap' if mode in VOLUMES else 'factor'} | scale | coverage | scatter over blocks |",
        "|---|---|---|---|",
        *(
            f"| {gap} | {scale:.3f} | {calibration.coverage[gap]:.1%} | {calibration.scatter[gap]:.1%} |"
            for gap, scale in calibration.scale.items()
        ),
    ]


def recipe_of(request: Request) -> str:
    """What sections were degraded by, in words."""
    if request.degradation is None:
        return "registered pairs" if request.pairs else "noisy sections alone"
    least, greatest = request.degradation.counts
    finer = f", pixels {request.factor} times as large" if request.factor > 1 else ""
    return f"dwell times of {least:g} to {greatest:g} electrons a white pixel{finer}"


def open_board(folder: Path, step: int) -> Any:
    """A TensorBoard writer that hides what was written after ``step``, or None where TensorBoard is not installed."""
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=step + 1)
    return None
