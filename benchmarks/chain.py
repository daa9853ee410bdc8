"""Two modes in one pass, beside one alone and beside two runs with a volume between them.

    python benchmarks/chain.py DATA/fib25_val benchmarks/results/chain.json

Every 5th section of a part of the held-out stack is recorded again after a shorter dwell time (``training.degrade``),
and brought back to isotropic voxels: by linear interpolation, by ``vemdiffuse-a-fast`` alone, by ``emdiffuse-n-fast``
and then ``vemdiffuse-a-fast`` in two runs, and by both in one pass (EMDiffuse-n+vEMDiffuse-a). Scored against the clean
stack, apart for the planes on sections and for those between: PSNR, coverage of the 90 % interval of what is stored. Of
two runs the second knows nothing of the first one's uncertainty.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from predictions import NM, heading, read_stack

from emdiffuse_vol.metrics.image import psnr
from emdiffuse_vol.metrics.interpolation import linear
from emdiffuse_vol.metrics.spread import coverage
from emdiffuse_vol.reconstruct.greys import measure_greys
from emdiffuse_vol.reconstruct.lazy import isotropic
from emdiffuse_vol.training.degrade import COUNTS, record

FACTOR, PART = 5, (slice(0, 96), slice(0, 160), slice(0, 160))
FIRST, THEN = ("EMDiffuse-n", "emdiffuse-n-fast"), ("vEMDiffuse-a", "vemdiffuse-a-fast")
Made = tuple[np.ndarray, np.ndarray | None]


def main(data: Path, out: Path) -> None:
    truth = read_stack(data)[PART]
    truth = truth[: (len(truth) - 1) // FACTOR * FACTOR + 1]
    rows = []
    for name, counts in COUNTS.items():
        greys, _ = measure_greys(truth.shape, lambda box: truth[box.slices()])
        noisy = record(np.random.default_rng(0), truth[::FACTOR], greys, counts)
        restored = run(noisy, *FIRST)[0]
        made: dict[str, Made] = {
            "linear": (linear(noisy, FACTOR), None),
            THEN[1]: run(noisy, *THEN),
            "two runs": run(restored, *THEN),
            "one pass": run(noisy, f"{FIRST[0]}+{THEN[0]}", f"{FIRST[1]}+{THEN[1]}"),
        }
        for method, (mean, uncertainty) in made.items():
            rows.append({"noise": name, "counts": counts, "method": method, **score(mean, uncertainty, truth)})
            print(rows[-1], flush=True)
    out.write_text(json.dumps({**heading("chain.py", data), "factor": FACTOR, "rows": rows}, indent=2) + "\n")


def run(sections: np.ndarray, mode: str, weights: str) -> Made:
    stack = xr.DataArray(sections, dims=("z", "y", "x"))
    made = isotropic(stack, voxel_size=(NM * FACTOR, NM, NM), mode=mode, weights=weights, skip_empty=False)
    made = made.compute(scheduler="synchronous")
    return made["mean"].values, made["uncertainty"].values


def score(mean: np.ndarray, uncertainty: np.ndarray | None, truth: np.ndarray) -> dict[str, Any]:
    result: dict[str, Any] = {}
    on = np.arange(len(truth)) % FACTOR == 0
    for where, planes in (("sections", on), ("between", ~on)):
        result[f"psnr_{where}"] = round(psnr(mean[planes], truth[planes], 255.0), 3)
        if uncertainty is not None and uncertainty[planes].any():
            held = coverage(mean[planes].astype(np.float32), uncertainty[planes], truth[planes])
            result[f"coverage_{where}"] = round(held, 4)
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
