"""The embedded weights, from data to file: train, calibrate, write. Run again to continue where it stopped.

    python pipelines/train_default_weights.py DATA/fib25_train runs/default

DATA/fib25_train holds ``grayscale_maps/*.png``, 250 sections of 250 x 250 pixels, isotropic. Settings:
``configs/train-slab-fib25-cpu.json``. The part x >= 210 is never trained on: its lower half in y gives the
calibration, the upper half the coverage written beside it. On two CPU cores this takes about an hour and a half.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from skimage.io import imread

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.models.checkpoints import save_weights
from emdiffuse_vol.models.slab import SlabNet
from emdiffuse_vol.reconstruct.greys import measure_greys
from emdiffuse_vol.training.calibrate import Calibration, calibrate
from emdiffuse_vol.training.fit import FitSettings, fit

NAME = "vemdiffuse-slab"
CONFIG = Path(__file__).parents[1] / "configs" / "train-slab-fib25-cpu.json"
TRAIN_X = 210
GAPS = (4, 5, 6, 8, 10)


def main(data: Path, folder: Path) -> None:
    volume = np.stack([imread(path) for path in sorted((data / "grayscale_maps").glob("*.png"))])
    settings = FitSettings(**json.loads(CONFIG.read_text()))
    greys, _ = measure_greys(volume.shape, lambda box: volume[box.slices()])
    torch.manual_seed(settings.seed)
    net = SlabNet().to(memory_format=torch.channels_last_3d)
    fit(net, [greys.normalise(volume[:, :, :TRAIN_X])], settings, folder, report)
    path = folder / f"{NAME}.safetensors"
    write(path, net, settings, None)
    depth, height, width = volume.shape
    lower = Box((0, 0, TRAIN_X), (depth, height // 2, width))
    upper = Box((0, height // 2, TRAIN_X), (depth, height, width))
    calibration = calibrate(str(path), volume, lower, upper, GAPS, tile=(64, 128, 52))
    write(path, net, settings, calibration)
    print(json.dumps(asdict(calibration), indent=2))


def write(path: Path, net: SlabNet, settings: FitSettings, calibration: Calibration | None) -> None:
    save_weights(
        path,
        net,
        architecture="slab",
        config={},
        modes=["vEMDiffuse-i", "vEMDiffuse-a"],
        name=NAME,
        gaps=[1.5, 14],
        greys="percentiles",
        calibration=asdict(calibration) if calibration else {},
        training={
            "data": "FIB-25 Drosophila medulla FIB-SEM, training_sample1 of janelia-flyem/neuroproof_examples, x < 210",
            "licence": "CC-BY; greys cropped, normalised and resampled",
            "settings": asdict(settings),
        },
    )


def report(row: dict[str, float]) -> None:
    if row["step"] % 100 == 0:
        print({key: round(value, 4) for key, value in row.items()}, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
