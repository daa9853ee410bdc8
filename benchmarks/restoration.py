"""Sections restored: the default weights beside what needs no training, on a volume that none of them saw.

    python benchmarks/restoration.py DATA/fib25_val benchmarks/results/restoration.json --lpips FOLDER
        --pairs DATA/emdiffuse_pairs

The first ``--sections`` sections are recorded again after three shorter dwell times (``training.degrade``: Poisson
counts and an amplifier's noise, stored as uint8), and for a factor of 2 with pixels twice as large, without and with
such noise. Networks run through the engine that a user runs, default settings. What is scored against the sections as
they were:

    psnr, ssim, fsim, lpips    the mean (255 = full range; the last two on ``PLANES`` sections, evenly spread)
    resolution_px              1 / the frequency at which the Fourier ring correlation with the truth falls below 1/7
    coverage_90, spread_skill  the stored uncertainty
    share_of_supervised        FastScan-ss: its gain in dB over the input, over that of FastScan-s

Beside them: the better of medians over 3 x 3 and 5 x 5 pixels, and of non-local means (scikit-image) with three
strengths around the recommended 0.8 sigma, both chosen with the truth at hand, which favours them. BM3D is not among
them: its implementation is licensed for non-commercial use alone.

``--pairs``: two real pairs of fast and slow scans of mouse brain. The slow scan is noisy too, and the pairs were
registered by interpolation, so their noise is smooth, unlike any that the weights know. Each pair is also what the
weights are tuned on, as `emdvol train --from emdiffuse-n-fast --pair` does, to restore the other one: before and after.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from lpips_offline import open_lpips
from predictions import heading, read_stack, rounded
from scipy.ndimage import median_filter
from skimage.io import imread
from skimage.restoration import denoise_nl_means
from torch import from_numpy

from emdiffuse_vol.config import load_training
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.metrics.features import feature_similarity, features
from emdiffuse_vol.metrics.image import psnr, score_image
from emdiffuse_vol.metrics.noise import noise_levels
from emdiffuse_vol.metrics.perceptual import Lpips
from emdiffuse_vol.metrics.spectra import resolution, ring_correlation
from emdiffuse_vol.metrics.spread import score_spread
from emdiffuse_vol.reconstruct.greys import Codes, measure_greys
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.run import prepare, reconstruct
from emdiffuse_vol.stores.image import create_image, finish, open_array, write_units
from emdiffuse_vol.training.degrade import COUNTS, record
from emdiffuse_vol.training.train import train

PLANES = 8
NM = 10.0
DENOISERS = {"emdiffuse-n-fast": "EMDiffuse-n", "fastscan-s-fast": "FastScan-s", "fastscan-ss-fast": "FastScan-ss"}
COARSE = {"none": None, "mild": COUNTS["mild"], "moderate": COUNTS["moderate"]}


@dataclass
class Reference:
    truth: np.ndarray
    lpips: Lpips | None

    @cached_property
    def sample(self) -> np.ndarray:
        return np.unique(np.linspace(0, len(self.truth) - 1, PLANES).round().astype(int))

    @cached_property
    def features(self) -> Any:
        return features(self.truth[self.sample])

    @cached_property
    def maps(self) -> Any:
        assert self.lpips
        return self.lpips.features(self.truth[self.sample])

    def score(self, image: np.ndarray, uncertainty: np.ndarray | None = None) -> dict[str, float]:
        whole = score_image(image, self.truth, 255.0)
        chosen = image[self.sample]
        row = {"psnr": whole.psnr, "ssim": whole.ssim}
        row["fsim"] = float(feature_similarity(features(chosen), self.features).mean())
        if self.lpips:
            row["lpips"] = float(self.lpips.distance(self.lpips.features(chosen), self.maps).mean())
        row["resolution_px"] = resolution(ring_correlation(image, self.truth))
        if uncertainty is not None:
            spread = score_spread(image, uncertainty, self.truth)
            row |= {"coverage_90": spread.coverage, "spread_skill": spread.spread_skill}
        return row


def restored(stack: np.ndarray, mode: str, weights: str) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """-> mean and uncertainty as stored, in greys, and what it cost."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = str(Path(folder) / "in.zarr"), str(Path(folder) / "out.zarr")
        create_image(source, shape=stack.shape, dtype=str(stack.dtype), voxel_size=(NM, NM, NM), chunk=(8, 64, 64))
        finish(write_units(open_array(source, 0, "w"), Box.of(stack.shape), stack))
        request = Request(input=source, out=out, mode=mode, weights=weights)
        plan = prepare(request).summary()
        started = time.process_time()
        reconstruct(request)
        seconds = time.process_time() - started
        mean, codes = open_array(out).read().result()
    cost = {
        "flop_per_voxel": plan["flop_per_voxel_network"],
        "flop_per_voxel_with_overlap": plan["flop_per_voxel"],
        "seconds_per_megavoxel": seconds / mean.size * 1e6,
    }
    return mean, codes * Codes(str(stack.dtype)).step, cost


def classical(noisy: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """The better ones of medians and of non-local means."""
    sigma = float(np.median(noise_levels(noisy)))

    def non_local(strength: float) -> np.ndarray:
        means = [
            denoise_nl_means(plane.astype(np.float32), 5, 6, strength * sigma, fast_mode=True, sigma=sigma)
            for plane in noisy
        ]
        return np.stack(means)

    def best(images: list[np.ndarray]) -> np.ndarray:
        return max(images, key=lambda image: psnr(image, truth))

    medians = [median_filter(noisy, (1, size, size)) for size in (3, 5)]
    return {"median": best(medians), "non-local means": best([non_local(s) for s in (0.6, 0.8, 1.0)])}


def interpolated(coarse: np.ndarray, mode: str) -> np.ndarray:
    fine = F.interpolate(from_numpy(coarse.astype(np.float32))[:, None], scale_factor=2, mode=mode, align_corners=False)
    return fine[:, 0].numpy()


def denoised(truth: np.ndarray, counts: float, lpips: Lpips | None, weights: dict[str, str]) -> dict[str, Any]:
    noisy, reference = fast(truth, counts), Reference(truth, lpips)
    rows = {"input": reference.score(noisy)}
    rows |= {name: reference.score(image) for name, image in classical(noisy, truth).items()}
    for name, mode in DENOISERS.items():
        mean, uncertainty, cost = restored(noisy, mode, weights.get(name, name))
        rows[name] = reference.score(mean, uncertainty) | cost
    gains = {name: rows[name]["psnr"] - rows["input"]["psnr"] for name in DENOISERS}
    levels = noise_levels(noisy)
    return {
        "counts": counts,
        "noise": float((noisy - truth.astype(np.float64)).std()),
        "noise_estimated": [float(levels.min()), float(np.median(levels)), float(levels.max())],
        "share_of_supervised": gains["fastscan-ss-fast"] / gains["fastscan-s-fast"],
        "methods": rows,
    }


def refined(truth: np.ndarray, counts: float | None, lpips: Lpips | None, weights: dict[str, str]) -> dict[str, Any]:
    coarse, reference, name = fast(truth, counts, 2), Reference(truth, lpips), "emdiffuse-r-fast"
    rows = {mode: reference.score(interpolated(coarse, mode)) for mode in ("bilinear", "bicubic")}
    mean, uncertainty, cost = restored(coarse, "EMDiffuse-r", weights.get(name, name))
    rows[name] = reference.score(mean, uncertainty) | cost
    return {"counts": counts, "methods": rows}


def fast(truth: np.ndarray, counts: float | None, factor: int = 1) -> np.ndarray:
    """counts: None for no noise."""
    greys, _ = measure_greys(truth.shape, lambda box: truth[box.slices()])
    noise = {"counts": 1e9, "read": 0.0} if counts is None else {"counts": counts}
    return record(np.random.default_rng(0), truth, greys, factor=factor, **noise)


def real_pairs(folder: Path, weights: str, minutes: float) -> dict[str, Any]:
    """Every pair restored by what needs no training, the default weights, and weights tuned on the other pair."""
    inputs = sorted(folder.glob("Input_*.tif"))
    rows: dict[str, Any] = {}
    for path, other in zip(inputs, reversed(inputs), strict=True):
        noisy, slow = (imread(p)[None] for p in (path, partner(path)))
        reference = Reference(slow, None)
        row = {"input": reference.score(noisy)}
        row |= {name: reference.score(image) for name, image in classical(noisy, slow).items()}
        with tempfile.TemporaryDirectory() as out:
            pair = {"condition": str(other), "target": str(partner(other))}
            asked = {"start_from": weights, "pairs": [pair], "minutes": minutes, "out": out, "name": "tuned"}
            tuned = str(train(load_training(None, asked)))
            for name, file in (("before tuning", weights), ("tuned on the other pair", tuned)):
                mean, uncertainty, _ = restored(noisy, "EMDiffuse-n", file)
                row[name] = reference.score(mean, uncertainty)
        rows[path.stem.removeprefix("Input_")] = row
    return {"minutes": minutes, "pairs": rows}


def partner(path: Path) -> Path:
    return path.with_name(path.name.replace("Input_", "GT_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--sections", type=int, default=64)
    parser.add_argument("--lpips", type=Path, default=None, metavar="FOLDER", help="see lpips_offline.py")
    parser.add_argument("--pairs", type=Path, default=None, metavar="FOLDER", help="without: no real pairs")
    parser.add_argument("--minutes", type=float, default=2.0, help="of tuning on a pair")
    parser.add_argument("--weights", nargs="*", default=[], metavar="NAME=FILE", help="instead of embedded ones")
    parser.add_argument("--crop", type=int, default=None, metavar="N", help="a trial: the first N pixels of each axis")
    asked = parser.parse_args()
    weights = dict(entry.split("=", 1) for entry in asked.weights)
    truth = read_stack(asked.data)[: asked.sections, : asked.crop, : asked.crop]
    lpips = open_lpips(asked.lpips) if asked.lpips else None
    written = heading("restoration.py", asked.data) | {"shape": truth.shape, "denoising": {}, "resolution": {}}
    parts: list[tuple[str, dict[str, Any], Callable[..., dict[str, Any]]]] = [
        ("denoising", COUNTS, denoised),
        ("resolution", COARSE, refined),
    ]
    for part, levels, run in parts:
        for level, counts in levels.items():
            row = written[part][level] = run(truth, counts, lpips, weights)
            for name, scores in row["methods"].items():
                print(part, level, name, {key: round(value, 3) for key, value in scores.items()}, flush=True)
            asked.result.write_text(json.dumps(rounded(written), indent=1) + "\n")
    if asked.pairs:
        written["real_pairs"] = real_pairs(
            asked.pairs, weights.get("emdiffuse-n-fast", "emdiffuse-n-fast"), asked.minutes
        )
        asked.result.write_text(json.dumps(rounded(written), indent=1) + "\n")


if __name__ == "__main__":
    main()
