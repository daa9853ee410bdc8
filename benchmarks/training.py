"""Speed and memory of training, per network.

    python benchmarks/training.py benchmarks/results/training.json

Steps of the loop behind `emdvol train` on greys from the procedural phantom, each network in a process of its own: the
default batch (2 crops of about 24 planes of 64 x 64 pixels; the published network: 4 planes of 64 x 64), the mean
alone and with its members. ``voxels_per_second`` counts voxels of the output grid that were predicted.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from predictions import heading, rounded

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.models.checkpoints import MODELS
from emdiffuse_vol.reconstruct.device import choose_device
from emdiffuse_vol.stores.phantom import PhantomVolume
from emdiffuse_vol.training.augment import Augment
from emdiffuse_vol.training.fit import FitSettings, Run
from emdiffuse_vol.training.objectives import Sizes, SlabObjective, vem_objective
from emdiffuse_vol.training.sources import Cubes
from emdiffuse_vol.training.volumes import TrainingVolume, isotropic_volume

WARM, TIMED = 3, 10
CASES = {
    "slab, mean": ("slab", 1.0, (5,), 2),
    "slab, mean and members": ("slab", 0.0, (5,), 2),
    "plane, mean": ("plane", 1.0, (5,), 2),
    "unet-vem": ("unet-vem", 1.0, (5,), 4),
}


class Whole(Cubes):
    """One volume that is in memory already."""

    def __init__(self, volume: TrainingVolume) -> None:
        self.volume, self.sources = volume, []

    def choose(self, rng: np.random.Generator, step: int) -> TrainingVolume:
        return self.volume


def measure(name: str) -> dict[str, Any]:
    architecture, members_from, factors, batch = CASES[name]
    phantom = PhantomVolume.from_url("phantom:96x96x96?voxel_size=10,10,10&seed=0")
    volume = isotropic_volume(phantom.read(Box.of((96, 96, 96))).astype(np.float32) / 128 - 1)
    sizes = Sizes(batch, 24, 64, factors)
    cubes = Whole(volume)
    objective: Any = (
        vem_objective(cubes, [volume], sizes, Augment(), False)
        if architecture == "unet-vem"
        else SlabObjective(cubes, [volume], sizes, Augment())
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = FitSettings(members_from=members_from)
        run = Run(MODELS[architecture](), objective, settings, Path(folder), choose_device())
        for _ in range(WARM):
            run.advance()
        before = run.seconds
        for _ in range(TIMED):
            run.advance()
        seconds = (run.seconds - before) / TIMED
    voxels = batch * 64 * 64 * (1 if architecture == "unet-vem" else 26)
    return {
        "case": name,
        "seconds_per_step": seconds,
        "voxels_per_second": voxels / seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parameters": sum(p.numel() for p in run.net.parameters()),
        "device": run.device.name,
        "precision": run.device.precision,
        "threads": torch.get_num_threads(),
    }


def main(result: Path) -> None:
    rows = []
    for name in CASES:
        command = [sys.executable, __file__, "--case", name]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(rows[-1], flush=True)
    result.write_text(json.dumps(rounded({**heading("training.py", Path("phantom")), "cases": rows}), indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--case":
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(Path(sys.argv[1]))
