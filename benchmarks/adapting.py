"""What adapting the default weights to a volume buys: `emdvol reconstruct --adapt`, before and after.

    python benchmarks/adapting.py DATA benchmarks/results/adapting.json --minutes 5

Weights trained on one kind of volume meet another. Planes or sections are withheld and scored; all that the network
ever sees is the stack that is left.

fib25 changed   ``fib25_val``, another cube of the weights' specimen, as another detector would give it: darker and
                flatter greys (gamma 1.6, range 60 %) and more noise (normal, 10 greys); every 5th plane is kept
vnc sstem       ``vnc_sstem_NC``, ssTEM of another animal's nerve cord, pixels binned 2 x 2 to 9.2 nm, every second of
                the 20 sections kept and the others withheld: 10 pixels apart, real sections as truth

Gain over linear interpolation on what was withheld, and coverage of the 90 % interval there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from predictions import heading, read_stack, rounded
from skimage.io import imread

from emdiffuse_vol.metrics.image import psnr, ssim
from emdiffuse_vol.metrics.interpolation import linear
from emdiffuse_vol.metrics.spread import coverage
from emdiffuse_vol.models.checkpoints import load_weights
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.run import reconstruct
from emdiffuse_vol.stores.image import open_array, write_array
from emdiffuse_vol.training.adapt import adapted

Stack = tuple[np.ndarray, np.ndarray, int]  # sections kept; all that are known, from the first to the last kept; gap


def changed(data: Path) -> Stack:
    greys = read_stack(data / "fib25_val") / 255.0
    noise = np.random.default_rng(0).normal(0, 10, greys.shape)
    truth = np.clip(255 * (0.1 + 0.6 * greys**1.6) + noise, 0, 255).astype(np.uint8)
    return truth[:246:5], truth[:246], 5


def sstem(data: Path) -> Stack:
    files = sorted((data / "vnc_sstem_NC" / "stack1" / "raw").glob("*.tif"))
    truth = np.stack([imread(file) for file in files])
    binned = truth.reshape(len(truth), 512, 2, 512, 2).mean((2, 4)).round().astype(np.uint8)[:19]
    return binned[::2], binned, 10


CASES = {"fib25 changed": changed, "vnc sstem": sstem}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    options = parser.parse_args()
    rows = [{"case": name, **compare(*make(options.data), options.minutes)} for name, make in CASES.items()]
    report = {**heading("adapting.py", options.data), "minutes": options.minutes, "cases": rows}
    options.result.write_text(json.dumps(rounded(report), indent=2) + "\n")
    print(json.dumps(rounded(report), indent=2))


def compare(sections: np.ndarray, known: np.ndarray, gap: int, minutes: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = str(folder / "in.zarr")
        write_array(path, sections, (10.0 * gap, 10, 10))
        request = Request(input=path, out=str(folder / "out.zarr"), factor=gap, adapt=f"{minutes:g}m")
        plain = linear(sections, gap)
        step = gap * (len(sections) - 1) // (len(known) - 1)  # planes from one known section to the next
        places = np.array([p for p in range(len(plain)) if p % gap and p % step == 0])
        truth = known[places // step]
        result: dict[str, Any] = {"linear_psnr": psnr(plain[places], truth)}
        tuned = adapted(request)
        for kind, asked in (
            ("before", Request(input=path, out=str(folder / "plain.zarr"), factor=gap)),
            ("after", tuned),
        ):
            reconstruct(asked)
            mean, codes = open_array(asked.out).read().result()
            result[kind] = {
                "gain_db": psnr(mean[places], truth) - result["linear_psnr"],
                "gain_ssim": ssim(mean[places], truth) - ssim(plain[places], truth),
                "coverage_90": coverage(mean[places], codes[places] / 8, truth),
            }
        training = load_weights(str(tuned.weights)).metadata["training"]
        return result | {"steps": training["steps"], "training_seconds": training["seconds"]}


if __name__ == "__main__":
    main()
