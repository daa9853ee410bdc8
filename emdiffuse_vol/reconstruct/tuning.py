"""Which precision, tile and number of networks at once are fastest here, for some weights: measured once and kept.

Convention: a choice belongs to a device (its name and cores), weights and versions, and is a JSON file in the folder of
the user's weights. It fills in what a request leaves open; an output that exists goes on as it was begun.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import prod
from pathlib import Path

import numpy as np
import torch

from emdiffuse_vol import __version__
from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.executors import available_cores
from emdiffuse_vol.geometry.boxes import Triple
from emdiffuse_vol.models.checkpoints import Weights
from emdiffuse_vol.models.registry import folder
from emdiffuse_vol.models.slab import SlabNet
from emdiffuse_vol.modes import isotropic_mode
from emdiffuse_vol.reconstruct.device import Device, choose_device
from emdiffuse_vol.reconstruct.estimate import hardware
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.predict import Tile
from emdiffuse_vol.reconstruct.predictors import Sampling, SlabPredictor
from emdiffuse_vol.reconstruct.resources import available_memory
from emdiffuse_vol.stores.metadata import read_attributes

DEPTH = 16  # planes of a tile that is timed: a quarter of what a run takes, as they cost the same
SIDES = (128, 256, 512)


@dataclass(frozen=True)
class Setting:
    precision: str
    tile: Triple
    workers: int


@dataclass(frozen=True)
class Measured:
    setting: Setting
    voxels_per_second: float


def tune(weights: Weights, name: str = "auto", notify: Callable[[Measured], None] = lambda row: None) -> Setting:
    """Search one thing after the other: precision, tile, networks at once; keep the fastest. name: of the device.

    Raises ConfigError for weights whose tiles have no choice.
    """
    if not isinstance(weights.net, SlabNet):
        raise ConfigError(f"weights {weights.name} are not of our network for slabs; there is nothing to tune")
    device = choose_device(name)
    depth, *_ = SlabPredictor.CORE
    best, rows = Measured(Setting(device.precision, SlabPredictor.CORE, 1), 0.0), []
    cores = available_cores()
    steps: list[Callable[[Setting], Iterator[Setting]]] = [
        lambda found: (replace(found, precision=precision) for precision in {"float32", device.precision}),
        lambda found: (replace(found, tile=(depth, side, side)) for side in SIDES if side != found.tile[1]),
        lambda found: (replace(found, workers=n) for n in {2, cores} if 1 < n <= cores and device.name == "cpu"),
    ]
    for step in steps:
        for setting in step(best.setting):
            if (speed := measure(weights, setting, device.name)) is not None:
                rows.append(Measured(setting, speed))
                notify(rows[-1])
        best = max([best, *rows], key=lambda row: row.voxels_per_second)
    _keep(weights, device.name, best, rows)
    return best.setting


def measure(weights: Weights, setting: Setting, device: str, members: int = 4) -> float | None:
    """Output voxels per second of the network alone; None where it would not fit the memory."""
    _, height, width = setting.tile
    mode = isotropic_mode((2 * DEPTH, 3 * height, 3 * width), (5.0, 1.0, 1.0))
    sampling = Sampling(members, 0, "ancestral", 1, (DEPTH, height, width))
    net: SlabNet = weights.net  # type: ignore[assignment]
    here = Device(device, setting.precision)
    predictor = SlabPredictor(net, mode, sampling, here)
    available = available_memory()
    if device == "cpu" and available is not None and available < 2 * setting.workers * predictor.memory():
        return None
    box = predictor.tiling.input_box((1, 1, 1))
    needed = mode.read_box(box)
    below, t = mode.axial.locate(np.arange(box.start[0], box.stop[0]))
    greys = np.random.default_rng(0).standard_normal(needed.shape, dtype=np.float32)
    tile = Tile(box, greys, below - needed.start[0], t)
    with ThreadPoolExecutor(setting.workers) as networks:
        if device != "cpu":  # kernels are loaded when they are first used
            networks.submit(predictor, [tile]).result()
        started = time.perf_counter()
        for done in [networks.submit(predictor, [tile]) for _ in range(setting.workers)]:
            done.result()
        here.wait()
        return setting.workers * prod(predictor.tiling.core) / (time.perf_counter() - started)


def settle(request: Request, weights: Weights) -> Request:
    """What a request leaves open, as is fastest on this machine, if that was looked for. An output that was begun keeps
    its precision and tile, which decide its bits."""
    path = _path(weights, choose_device(request.device).name)
    if not path.is_file():
        return request
    found = json.loads(path.read_text())["setting"]
    request = replace(request, workers=request.workers or found["workers"])
    if begun := read_attributes(Path(request.out)).get("emdvol", {}).get("job"):
        found = begun
    precision = found["precision"] if request.precision == "auto" else request.precision
    return replace(request, precision=precision, tile=request.tile or (found["tile"] and tuple(found["tile"])))


def _keep(weights: Weights, device: str, best: Measured, rows: list[Measured]) -> None:
    path = _path(weights, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"device": hardware(device), "weights": weights.name, **asdict(best), "measured": [asdict(r) for r in rows]}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(told, indent=2) + "\n")
    part.replace(path)


def _path(weights: Weights, device: str) -> Path:
    key = f"{hardware(device)} {available_cores()} {weights.sha256} {__version__} {torch.__version__}"
    return folder() / "tuned" / f"{sha256(key.encode()).hexdigest()[:16]}.json"
