"""The embedded weights for modes that restore sections, from data to files. Run again to continue where it stopped.

    python pipelines/train_restoration_weights.py DATA/fib25_train runs

DATA/fib25_train holds ``grayscale_maps/*.png``, 250 sections of 250 x 250 pixels. Four trainings, as
``configs/train-{emdiffuse-n,emdiffuse-r,fastscan-s,fastscan-ss}.json`` say, 10 to 20 minutes each on one CPU core. The
last sees noisy copies of the volume alone, which are made here, one at each named dwell time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from train_default_weights import CONFIGS, read_stack, write

from emdiffuse_vol.config import load_training
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.reconstruct.greys import measure_greys
from emdiffuse_vol.training.degrade import COUNTS, record
from emdiffuse_vol.training.train import train

NAMES = ("emdiffuse-n", "emdiffuse-r", "fastscan-s", "fastscan-ss")


def main(data: Path, folder: Path) -> None:
    clean = read_stack(data)
    write(folder / "data" / "fib25_train.zarr", clean, 1)
    greys, _ = measure_greys(Box.of(clean.shape).shape, lambda box: clean[box.slices()])
    for seed, (level, counts) in enumerate(COUNTS.items()):
        noisy = record(np.random.default_rng(seed), clean, greys, counts)
        write(folder / "data" / f"fib25_train_{level}.zarr", noisy, 1)
    for name in NAMES:
        config = CONFIGS / f"train-{name}.json"
        volumes = load_training(str(config), {}).volumes
        here = [{"path": str(folder / "data" / Path(volume.path).name)} for volume in volumes]
        out = folder / f"{name}-fast"
        train(load_training(str(config), {"volumes": here, "out": str(out), "name": out.name}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
