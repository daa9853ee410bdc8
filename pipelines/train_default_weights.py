"""The embedded weights, from data to files. Run again to continue where it stopped.

    python pipelines/train_default_weights.py DATA/fib25_train runs

DATA/fib25_train holds ``grayscale_maps/*.png``, 250 sections of 250 x 250 pixels, isotropic. Two trainings, as
``configs/train-vemdiffuse-{i,a}-fast.json`` say, an hour and a half each on two CPU cores; the second sees every fifth
plane alone. The last 16 % of the x axis is never trained on and serves to calibrate. The ``best`` weights are made of
these without more training: the mean over four turns of a section, for vEMDiffuse-i of both networks.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from skimage.io import imread

from emdiffuse_vol.config import load_training
from emdiffuse_vol.models.checkpoints import load_weights, save_weights
from emdiffuse_vol.models.ensemble import SlabEnsemble
from emdiffuse_vol.stores.image import write_array
from emdiffuse_vol.training.calibrate import HeldOut
from emdiffuse_vol.training.train import calibrated, prepare, train, unseen

CONFIGS = Path(__file__).parents[1] / "configs"
NM, EVERY = 10.0, 5
GAPS = (5, 10)  # that ``best`` weights are calibrated for; between them the scale is interpolated
DATA = {"i": ("fib25_train.zarr", 1), "a": ("fib25_train_x5.zarr", EVERY)}


def main(data: Path, folder: Path) -> None:
    volume = read_stack(data)
    for name, every in DATA.values():
        write(folder / "data" / name, volume[::every], every)
    for letter in DATA:
        train(request(letter, folder))
    best("i", ["i", "a"], folder)
    best("a", ["a"], folder)


def request(letter: str, folder: Path):
    volumes = [{"path": str(folder / "data" / DATA[letter][0])}]
    name = f"vemdiffuse-{letter}-fast"
    return load_training(
        str(CONFIGS / f"train-{name}.json"), {"volumes": volumes, "out": str(folder / name), "name": name}
    )


def best(letter: str, of: list[str], folder: Path) -> None:
    """The ensemble of the ``fast`` networks of some modes, calibrated like those."""
    parts = [load_weights(str(folder / f"vemdiffuse-{m}-fast" / f"vemdiffuse-{m}-fast.safetensors")) for m in of]
    config = {"networks": len(parts), "turns": 4}
    net = SlabEnsemble(**config)
    first, *others = (part.net.state_dict() for part in parts)
    net.load_state_dict(first | {f"others.{i}.{key}": v for i, other in enumerate(others) for key, v in other.items()})
    name = f"vemdiffuse-{letter}-best"
    path = folder / f"{name}.safetensors"
    facts = {"architecture": "slab-ensemble", "config": config, "name": name}
    facts |= {key: parts[0].metadata[key] for key in ("modes", "gaps", "greys", "training")}
    save_weights(path, net, **facts)
    asked = request(letter, folder)
    _, held_out = prepare(asked, parts[0].net)
    calibration = calibrated(asked, path, [smaller(part) for part in unseen(parts[0].net, held_out)], GAPS)
    save_weights(path, net, **facts, calibration=asdict(calibration))
    print(name, json.dumps(asdict(calibration)))


def smaller(part: HeldOut) -> HeldOut:
    """Half of it, along one axis, as many evaluations are dear."""
    half = part.volume.part((slice(len(part.volume.greys) // 2),))
    return replace(part, volume=replace(half, axes=half.axes[:1]))


def read_stack(data: Path) -> np.ndarray:
    return np.stack([imread(path) for path in sorted((data / "grayscale_maps").glob("*.png"))])


def write(path: Path, greys: np.ndarray, every: int) -> None:
    if not path.exists():
        write_array(path, greys, (NM * every, NM, NM))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
