"""Adapting weights to the volume that is to be reconstructed: `emdvol reconstruct ... --adapt 10m`.

Convention: vEMDiffuse-a needs no truth but the volume's own planes, hidden along y and x (see ``volumes``). Adapting is
a short training run from the given weights, at the volume's own distance of sections, in a folder beside the output,
``OUT.adapted``; it is calibrated on the part of the volume that it holds out. Once its weights are there they are used
as they are, so that the same command continues the same run.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.models.checkpoints import default_weights
from emdiffuse_vol.reconstruct.job import Request, differences
from emdiffuse_vol.reconstruct.run import check_place, prepare
from emdiffuse_vol.training.fit import FitSettings
from emdiffuse_vol.training.sources import VolumeSource
from emdiffuse_vol.training.train import Notify, train
from emdiffuse_vol.training.train import Request as TrainRequest

UNITS = {"s": 1, "m": 60, "h": 3600}
NAME, ASKED = "adapted", "asked.json"
# Short, and from good weights: a lower rate, spread and mean together from the start, rows filled by what is known.
RATE, WARMUP, DECAY, AVERAGE = 5e-4, 20, 0.5, 0.99


def parse_duration(text: str) -> float:
    """``90s``, ``10m`` or ``1.5h`` -> seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None or not float(match[1]) > 0:
        raise ConfigError(f"--adapt {text!r} is not a time such as 90s, 10m or 1.5h")
    return float(match[1]) * UNITS[match[2]]


def adapted(request: Request, notify: Notify = lambda run, row: None) -> Request:
    """The request with weights that were adapted for as long as its ``adapt`` says. Raises our errors."""
    if request.adapt is None:
        return request
    seconds = parse_duration(request.adapt)
    if request.mode != "vEMDiffuse-a":
        raise ConfigError(f"--adapt learns from the volume itself, as vEMDiffuse-a does; mode is {request.mode}")
    check_place(request.out, request.input)
    folder = Path(f"{request.out.rstrip('/')}.{NAME}")
    weights = folder / f"{NAME}.safetensors"
    _check_same(folder, request)
    if not weights.exists():
        prepared = prepare(request)  # all that can fail, before minutes are spent
        gap = round(prepared.plan.mode.gap)
        source = VolumeSource(
            path=request.input,
            voxel_size=request.voxel_size,
            level=request.level,
            channel=request.channel,
            roi=request.roi,
            mask=request.mask,
            damaged=request.damaged,
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ASKED).write_text(json.dumps(_asked(request), indent=2) + "\n")
        fit = FitSettings(
            minutes=seconds / 60,
            learning_rate=RATE,
            warmup=WARMUP,
            decay=DECAY,
            members_from=0.0,
            refill=(0.0, 0.5),
            ema=AVERAGE,
            seed=request.seed % 2**32,
        )
        train(
            TrainRequest(
                mode=request.mode,
                out=str(folder),
                name=NAME,
                volumes=(source,),
                start_from=request.weights or default_weights(request.mode),
                factors=tuple(sorted({max(2, gap - 1), gap, gap + 1})),
                fit=fit,
                device=prepared.job.device,
                precision=prepared.job.precision,
                data=f"The volume that was reconstructed with them, {Path(request.input).name}.",
                licence="that of the volume",
            ),
            notify,
        )
    return replace(request, weights=str(weights))


def _asked(request: Request) -> dict[str, Any]:
    """What decides the adapted weights, as JSON values."""
    names = ("input", "voxel_size", "level", "channel", "roi", "mask", "damaged", "weights", "factor", "seed", "adapt")
    values: dict[str, Any] = json.loads(json.dumps({name: getattr(request, name) for name in names}))
    return values | {"input": Path(request.input).name}  # which may be called by another path


def _check_same(folder: Path, request: Request) -> None:
    if not (folder / ASKED).exists():
        return
    if unlike := differences(json.loads((folder / ASKED).read_text()), _asked(request)):
        raise ConfigError(f"{folder} was adapted otherwise: {'; '.join(unlike)}; remove it, or choose another --out")
