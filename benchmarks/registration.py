"""Registration: how far off it is on real EM under known warps and noise, what it refuses, and drift of a stack.

    python benchmarks/registration.py DATA benchmarks/results/registration.json --pictures FOLDER

``sweep``: sections of DATA/fib25_train are bent by known warps; the fixed image is the bent one, both get noise of
their own, Poisson of a dwell time and a detector's. Residuals are the distances, in pixels, between where ``register``
says that a pixel lies and where it does, over all pixels that both images show. ``noise`` is the standard deviation of
the noise in greys, of the fixed and of the moving image; the sections' own is about 36.
``confidence``: of the same pixels, residuals by confidence.
``refused``: pairs of sections that do not show the same place, and what was measured.
``drift``: a walk at random is put on a stack of DATA/fib25_train and taken away by ``--stack``. Jitter is how far a
section lies from the middle between its neighbours.
``pairs``: the two real pairs of DATA/emdiffuse_pairs, which are registered already: their middle, as it is and shifted
apart. Truth is not known; *cycle* is how far the warps of a pair and of the same pair shifted by known pixels disagree.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from predictions import heading, read_stack, rounded
from scipy import ndimage
from skimage.io import imread

from emdiffuse_vol.registration.drift import corrections
from emdiffuse_vol.registration.features import find_features, fit_points
from emdiffuse_vol.registration.pairs import PASSES, STIFF, Registration, Settings, register
from emdiffuse_vol.registration.warps import at_cells, inside, places_of, transformed
from emdiffuse_vol.viewing.registration import draw_registration

SIDE, MARGIN = 210, 20  # of fixed images, inside sections of 250
READ = 3.0  # greys: the detector's noise
DWELLS = {
    "slow": (4.0, 4.0),
    "8 times faster": (4.0, 0.5),
    "fast": (1.0, 0.25),
    "beyond use": (0.5, 0.08),
}  # counts per grey
OTHER_FLOWS = [("rigid 7 degrees", "fast"), ("elastic 8 px, smooth 30", "fast")]  # measured for all flows
SEEDS = 1  # sections for every row
UNRELATED = 8
MIDDLE = slice(192, 576)  # of the rows and columns of real pairs


def about_middle(rows: Any) -> np.ndarray:
    middle = np.eye(3)
    middle[:2, 2] = (SIDE - 1) / 2
    return np.asarray(middle @ np.array(rows, float) @ np.linalg.inv(middle))


def rotation(degrees: float, shift: tuple[float, float]) -> np.ndarray:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return about_middle([[c, -s, shift[0]], [s, c, shift[1]], [0, 0, 1]])


def elastic(rng: np.random.Generator, smooth: float, most: float = 8.0) -> np.ndarray:
    """White noise smoothed by so many pixels, the longest displacement ``most`` pixels."""
    field = np.stack([ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), smooth) for _ in range(2)])
    return np.asarray(most * field / np.hypot(*field).max())


def warps(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Places [2, y, x] of the fixed image in the moving one."""
    straight = places_of((SIDE, SIDE))
    affine = about_middle([[1.04, 0.05, 4], [-0.03, 0.97, -7], [0, 0, 1]])
    turned = rotation(7, (6, -9))
    found = {
        "shift": transformed(rotation(0, (5.3, -8.6)), straight),
        "rigid 7 degrees": transformed(turned, straight),
        "rigid 60 degrees": transformed(rotation(60, (1, 2)), straight),
        "affine": transformed(affine, straight),
        "elastic 8 px, smooth 40": straight + elastic(rng, 40),
        "elastic 8 px, smooth 30": straight + elastic(rng, 30),
        "rigid and elastic": transformed(turned, straight + elastic(rng, 30)),
    }
    return {name: places + MARGIN for name, places in found.items()}


def noisy(rng: np.random.Generator, greys: np.ndarray, counts: float) -> np.ndarray:
    return np.asarray(rng.poisson(np.clip(greys, 0, None) * counts) / counts + rng.normal(0, READ, greys.shape))


def bent(section: np.ndarray, places: np.ndarray) -> np.ndarray:
    return np.asarray(ndimage.map_coordinates(section.astype(float), places, order=3, mode="reflect"))


def distances(found: Registration, places: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """-> residuals and confidences of the pixels that both images show."""
    straight = places_of((SIDE, SIDE))
    there = inside(places, shape)
    apart = np.hypot(*(found.warp(straight) - places))
    return apart[there], at_cells(found.confidence[None], straight)[0][there]


def described(apart: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(apart)), "p95": float(np.percentile(apart, 95)), "max": float(apart.max())}


def sweep(stack: np.ndarray) -> dict[str, Any]:
    settings = {"ilk": Settings(), "tvl1": Settings(flow="tvl1"), "none": Settings(flow="none")}
    rows, trust = [], []
    for name in warps(np.random.default_rng(0)):
        for dwell, (still, fast) in DWELLS.items():
            flows = list(settings) if (name, dwell) in OTHER_FLOWS else ["ilk"]
            for flow in flows:
                parts, seconds, refused = [], 0.0, 0
                for seed in range(SEEDS):
                    rng = np.random.default_rng(seed)
                    section = stack[60 * seed + 40]
                    places = warps(rng)[name]
                    pair = noisy(rng, bent(section, places), still), noisy(rng, section, fast)
                    begun = time.process_time()
                    found = register(*pair, settings[flow], settings[flow].load_flow())
                    seconds += time.process_time() - begun
                    refused += bool(found.failures)
                    parts.append(distances(found, places, section.shape))
                apart, confidence = (np.concatenate(part) for part in zip(*parts, strict=True))
                if flow == "ilk":
                    trust.append((apart, confidence))
                noise = [float(np.sqrt(stack.mean() / counts + READ**2)) for counts in (still, fast)]
                rows.append(
                    {"warp": name, "dwell": dwell, "noise": noise, "flow": flow, **described(apart)}
                    | {"refused": refused, "seconds": seconds / len(parts)}
                )
                print(rounded(rows[-1]), flush=True)
    apart, confidence = (np.concatenate(part) for part in zip(*trust, strict=True))
    bins = []
    for low, high in ((0, 0.5), (0.5, 0.8), (0.8, 0.9), (0.9, 0.95), (0.95, 1.01)):
        chosen = (confidence >= low) & (confidence < high)
        if chosen.any():
            bins.append({"from": low, "to": min(high, 1), "share": float(chosen.mean()), **described(apart[chosen])})
    return {"residuals": rows, "confidence": bins}


def refused(stack: np.ndarray) -> dict[str, Any]:
    """Pairs from places far apart, one of them turned or mirrored too; noise alone; the least of what is accepted."""
    rng, rows = np.random.default_rng(0), []
    chosen = {"features": Settings(), "correlation": Settings("translation", "correlation")}
    side = [np.moveaxis(stack, axis, 0) for axis in range(3)]
    for trial in range(UNRELATED):
        fixed = noisy(rng, side[trial % 3][20 + 4 * trial], 1)
        other = noisy(rng, np.rot90(side[(trial + 1) % 3][229 - 4 * trial], trial % 4), 0.25)
        if trial == UNRELATED - 1:
            other = rng.normal(128, 36, fixed.shape)
        for by, settings in chosen.items():
            found = register(fixed, other, settings, settings.load_flow())
            rows.append({"by": by, "refused": bool(found.failures), **found.measures})
            print(rounded(rows[-1]), flush=True)
    summary = {}
    for by in chosen:
        of = [row for row in rows if row["by"] == by]
        most = {key: max(row[key] for row in of) for key in ("agreeing", "confident") if all(key in row for row in of)}
        summary[by] = {"pairs": len(of), "refused": sum(row["refused"] for row in of), "greatest": most}
    return summary


def drift(stack: np.ndarray) -> dict[str, Any]:
    """A walk of 1 px and 0.3 degrees from section to section on 24 sections."""
    rng, count = np.random.default_rng(0), 24
    shifts, angles = rng.normal(0, 1, (count, 2)).cumsum(axis=0), rng.normal(0, 0.3, count).cumsum()
    truth = [rotation(angle, (float(shift[0]), float(shift[1]))) for angle, shift in zip(angles, shifts, strict=True)]
    straight = places_of((SIDE, SIDE))
    images = [
        noisy(rng, bent(section, transformed(matrix, straight) + MARGIN), 1)
        for section, matrix in zip(stack[:count], truth, strict=True)
    ]
    features = [find_features(image) for image in images]
    fits = [fit_points(a, b, "rigid", STIFF) for a, b in pairwise(features)]
    steps = [np.eye(3), *(fit.matrix for fit in fits)]
    inner = straight[:, 20:-20:10, 20:-20:10]

    def jitter(moved: list[np.ndarray]) -> float:
        lies = np.stack([transformed(matrix, transformed(m, inner)) for matrix, m in zip(truth, moved, strict=True)])
        return float(np.median(np.hypot(*np.moveaxis(lies[1:-1] - (lies[:-2] + lies[2:]) / 2, 1, 0))))

    found = {
        f"window {window:g}": jitter(list(corrections(steps, window, (SIDE, SIDE)))) for window in (2.0, 10.0, 50.0)
    }
    return {
        "sections": count,
        "agreeing_least": min(fit.agreeing for fit in fits),
        "jitter_px": {"before": jitter([np.eye(3)] * count), **found},
    }


def real_pairs(folder: Path, pictures: Path | None) -> dict[str, Any]:
    rows, apart = {}, (11, -7)
    settings = Settings()
    flow = settings.load_flow()
    for path in sorted(folder.glob("Input_*.tif")):
        name = path.stem.removeprefix("Input_")
        fixed, moving = imread(folder / f"GT_{name}.tif")[MIDDLE, MIDDLE], imread(path)[MIDDLE, MIDDLE]
        shifted = np.roll(moving, apart, (0, 1))[20:-20, 20:-20]
        found, again = register(fixed, moving, settings, flow), register(fixed, shifted, settings, flow)
        straight = places_of(fixed.shape)[:, 32:-32, 32:-32]
        moved = found.warp(straight)
        back = again.warp(straight) - np.array(apart)[:, None, None] + 20
        alone = register(fixed, moving, replace(settings, flow="none"), None)
        rows[name] = {
            "measures": found.measures,
            "moved_px": described(np.hypot(*(moved - straight))),
            "bend_px": described(np.hypot(*found.warp.bend)),
            "correlation_without_flow": alone.measures["correlation"],
            "cycle_px": described(np.hypot(*(moved - back))),
        }
        print(name, rounded(rows[name]), flush=True)
        if pictures:
            draw(pictures / f"registration-{name}.png", fixed, shifted, again)
    return rows


def example(stack: np.ndarray, path: Path) -> None:
    rng, section = np.random.default_rng(0), stack[40]
    still, fast = DWELLS["fast"]
    places = warps(rng)["rigid and elastic"]
    fixed, moving = noisy(rng, bent(section, places), still), noisy(rng, section, fast)
    settings = Settings()
    draw(path, fixed, moving, register(fixed, moving, settings, settings.load_flow()), 10)


def draw(path: Path, fixed: np.ndarray, moving: np.ndarray, found: Registration, nm: float = 1) -> None:
    straight = places_of(fixed.shape)
    after = ndimage.map_coordinates(moving.astype(np.float32), found.warp(straight), order=3, cval=0)
    before = np.zeros_like(fixed)
    part = tuple(slice(0, min(a, b)) for a, b in zip(fixed.shape, moving.shape, strict=True))
    before[part] = moving[part]
    bend = at_cells(found.warp.bend, straight)
    draw_registration(path, fixed, before, after, bend, at_cells(found.confidence[None], straight)[0], nm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder for pictures of the real pairs")
    parser.add_argument("--only", nargs="+", help="drift, refused, pairs, sweep; what OUT.json says of others stays")
    parser.add_argument("--example", type=Path, help="PNG of one pair of the sweep, and nothing else")
    asked = parser.parse_args()
    stack = read_stack(asked.data / "fib25_train")
    if asked.example:
        return example(stack, asked.example)
    kept = json.loads(asked.result.read_text()) if asked.only else {}
    written = kept | heading("registration.py", asked.data / "fib25_train") | {"flow_passes": PASSES}
    parts = {
        "drift": lambda: {"drift": drift(stack)},
        "refused": lambda: {"refused": refused(stack)},
        "pairs": lambda: {"pairs": real_pairs(asked.data / "emdiffuse_pairs", asked.pictures)},
        "sweep": lambda: sweep(stack),
    }
    for name in asked.only or parts:
        written |= parts[name]()
    asked.result.write_text(json.dumps(rounded(written), indent=1) + "\n")


if __name__ == "__main__":
    main()
