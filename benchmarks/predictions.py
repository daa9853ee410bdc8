"""What the benchmarks of quality have in common: the stack with a truth, and every method's answer to it.

Convention: a truth is isotropic [z, y, x]; of it every R-th plane is kept as a section, and planes up to the last
section are predicted. Predictions are in greys, planes on a section being that section. Networks run as they do for a
user: the plan, the blocks and the grey map of ``emdiffuse_vol.isotropic``, which gives the same voxels; here the
members are kept too.
"""

from __future__ import annotations

import gzip
import io
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.io import imread

from emdiffuse_vol import __version__
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.metrics.interpolation import cubic, linear
from emdiffuse_vol.models.checkpoints import embedded, load_weights
from emdiffuse_vol.reconstruct.greys import Codes
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.lazy import array_volume
from emdiffuse_vol.reconstruct.plan import Plan
from emdiffuse_vol.reconstruct.predict import Predictor, Tile, predict_block
from emdiffuse_vol.reconstruct.run import prepare_volume
from emdiffuse_vol.stores.volume import read_mirrored

NM = 10.0  # voxels of FIB-25
INTERPOLATIONS: dict[str, Callable[..., np.ndarray]] = {"linear": linear, "cubic": cubic}


@dataclass(frozen=True)
class Prediction:
    """mean [z, y, x] as stored, of interpolation unrounded; members [k, z, y, x] float32, for methods without a spread
    the mean alone; uncertainty [z, y, x] as stored, in greys, or None; facts: costs, as JSON values."""

    mean: np.ndarray
    members: np.ndarray
    uncertainty: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def part(self, box: Box) -> Prediction:
        """A copy, so that the whole can be forgotten."""
        cut = box.slices()
        spread = None if self.uncertainty is None else self.uncertainty[cut].copy()
        return Prediction(self.mean[cut].copy(), self.members[(slice(None), *cut)].copy(), spread, self.facts)


def read_stack(data: Path) -> np.ndarray:
    return np.stack([imread(path) for path in sorted((data / "grayscale_maps").glob("*.png"))])


def read_labels(data: Path) -> np.ndarray:
    """Bodies [z, y, x]: supervoxels, and which body each belongs to."""
    import h5py

    with gzip.open(data / "groundtruth.h5.gz") as file, h5py.File(io.BytesIO(file.read())) as tables:
        supervoxels, bodies = tables["stack"][:], tables["transforms"][:]
    table = np.zeros(int(max(supervoxels.max(), bodies[:, 0].max())) + 1, np.int64)
    table[bodies[:, 0]] = bodies[:, 1]
    labels: np.ndarray = table[supervoxels]
    return labels


def take_sections(stack: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> sections, the truth as far as they reach, and which of its planes are missing."""
    sections = stack[::factor]
    truth = stack[: (len(sections) - 1) * factor + 1]
    return sections, truth, np.arange(len(truth)) % factor != 0


def default_methods() -> list[str]:
    """Those that predict planes between sections."""
    return [*INTERPOLATIONS, *(name for name in embedded() if name.startswith("vemdiffuse"))]


def name_of(method: str) -> str:
    """Weights given by path go by the file's name."""
    return Path(method).stem if "/" in method or method.endswith((".safetensors", ".pth")) else method


def predict(method: str, sections: np.ndarray, factor: int, **settings: Any) -> Prediction:
    """method: a key of INTERPOLATIONS, or weights by name or path. settings: of ``Request``."""
    if method in INTERPOLATIONS:
        started = time.perf_counter()
        exact = INTERPOLATIONS[method](sections, factor)
        seconds = time.perf_counter() - started
        return Prediction(exact, exact[None], facts={"seconds_per_megavoxel": seconds / exact.size * 1e6})
    return run_network(method, sections, factor, **settings)


def run_network(weights: str, sections: np.ndarray, factor: int, **settings: Any) -> Prediction:
    import xarray as xr

    volume = array_volume(xr.DataArray(sections, dims=("z", "y", "x")), (NM * factor, NM, NM))
    known = load_weights(weights)
    mode = known.metadata["modes"][0]
    request = Request(input=volume.url, out="", weights=weights, mode=mode, factor=factor, skip_empty=False, **settings)
    prepared = prepare_volume(request, volume)
    plan, job, summary = prepared.plan, prepared.job, prepared.summary()
    recorder = Recorder(prepared.predictor, plan)
    codes = np.empty((2, *plan.region.shape), sections.dtype)
    started = time.perf_counter()
    for block in (plan[i] for i in range(len(plan))):
        greys = read_mirrored(prepared.volume, block.read)
        made = predict_block(plan, block, recorder, greys, job.grey_map, job.scales)
        codes[(slice(None), *block.write.slices(plan.region.start))] = made
    seconds = time.perf_counter() - started
    members = job.grey_map.restore(recorder.recorded)
    planes = np.arange(plan.region.start[0], plan.region.stop[0])
    measured = plan.mode.axial.measured(planes)
    members[:, measured] = codes[0, measured]
    facts = {
        "parameters": sum(p.numel() for p in known.net.parameters()),
        "members": request.members,
        "evaluations": summary["evaluations"],
        "flop_per_voxel": summary["flop_per_voxel_network"],
        "flop_per_voxel_with_overlap": summary["flop_per_voxel"],
        "seconds_per_megavoxel": seconds / plan.region.size * 1e6,
        "cell": summary["cell"],
        "device": job.device,
        "precision": job.precision,
        "weights_sha256": job.weights_sha256,
    }
    return Prediction(codes[0], members, codes[1] * np.float32(Codes(str(sections.dtype)).step), facts)


class Recorder:
    """A predictor that keeps the members of what it predicts, normalised greys [k, z, y, x] of the plan's region, put
    together as ``predict_block`` puts them together before it takes their spread."""

    def __init__(self, predictor: Predictor, plan: Plan) -> None:
        self.predictor, self.plan = predictor, plan
        self.recorded = np.zeros((predictor.members, *plan.region.shape), np.float32)
        self.done: set[Box] = set()  # border tiles are computed again for the next block

    def __call__(self, tiles: list[Tile]) -> tuple[np.ndarray, np.ndarray]:
        means, members = self.predictor(tiles)
        for tile, values in zip(tiles, members, strict=True):
            if tile.box not in self.done:
                self.done.add(tile.box)
                self._add(tile.box, np.asarray(values))
        return means, members

    def _add(self, box: Box, values: np.ndarray) -> None:
        tiling = self.plan.tiling
        reach = tiling.reach_of(box)
        part = reach & self.plan.region
        if not part.empty:
            inside = part.slices(reach.start)
            target = part.slices(self.plan.region.start)
            self.recorded[(slice(None), *target)] += tiling.window()[inside] * values[(slice(None), *inside)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.predictor, name)

    @property
    def batch(self) -> int:
        return self.predictor.batch

    @batch.setter
    def batch(self, size: int) -> None:
        self.predictor.batch = size


def machine() -> str:
    gpu = f"one {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU"
    return f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()}, {gpu}"


def heading(script: str, data: Path) -> dict[str, Any]:
    return {
        "made_by": f"benchmarks/{script}",
        "emdiffuse_vol": __version__,
        "torch": torch.__version__,
        "machine": machine(),
        "data": data.name,
    }


def rounded(value: Any) -> Any:
    """Five digits of every float in JSON values."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{float(value):.5g}") if isinstance(value, float | np.floating) else value
