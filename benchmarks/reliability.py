"""The published self-assessment, tried: does the flag fire where inputs are beyond use, and not where they are easy?

    python benchmarks/reliability.py DATA/fib25_val benchmarks/results/reliability.json docs/images/reliable-blocks.png

The held-out stack is made worse in two ways, by noise (its own, estimated, times 1, 2, 4, 8; every 5th section kept)
and by thick steps (every 2nd to every 12th section kept, 16 to 96 nm at 8 nm a voxel), and reconstructed by
``vemdiffuse-a-fast`` through the engine in blocks of 64^3. Of every block: the 99th percentile and the mean of its
uncertainty, from the ledger, and the error of its missing planes against the clean truth, root mean square; all on the
grey scale of 0 to 1.

A block is called *poor* where that error is above ``GOOD``, 0.05 (12.8 greys). Two flags are tried on it: the published
one, a 99th percentile of the uncertainty of at least 0.12, and ours, a mean uncertainty, which is the error to be
expected, of at least 0.05. How well each ranks blocks is told by the rank correlation with the error.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from predictions import machine, read_stack
from scipy.stats import spearmanr

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.metrics.image import psnr
from emdiffuse_vol.metrics.noise import noise_levels
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.ledger import Ledger
from emdiffuse_vol.reconstruct.reliability import GOOD, PUBLISHED, of_blocks
from emdiffuse_vol.reconstruct.run import reconstruct
from emdiffuse_vol.stores.image import create_image, finish, open_array, write_units
from emdiffuse_vol.stores.opening import open_volume

WEIGHTS, EDGE, PART = "vemdiffuse-a-fast", 64, (slice(0, 241), slice(0, 128), slice(0, 128))
NOISES, FACTOR = (1, 2, 4, 8), 5
FACTORS = (2, 4, 5, 6, 8, 10, 12)
VOXEL = 8.0  # nm


def main(data: Path, out: Path, picture: Path) -> None:
    truth = read_stack(data)[PART]
    own = float(np.median(noise_levels(truth)))
    conditions = [("noise", times, FACTOR, times) for times in NOISES]
    conditions += [("spacing", factor * VOXEL, factor, 1) for factor in FACTORS]
    rows = [condition(truth, kind, level, factor, times, own) for kind, level, factor, times in conditions]
    errors = np.concatenate([row["block_error"] for row in rows])
    ranked = {
        f"rank_correlation_of_{field}_and_error": round(
            float(spearmanr(np.concatenate([row[f"block_{field}"] for row in rows]), errors).statistic), 3
        )
        for field in ("p99", "mean")
    }
    for row in rows:
        row["flagged_published"] = share(np.array(row["block_p99"]) >= PUBLISHED)
        row["flagged_ours"] = share(np.array(row["block_mean"]) >= GOOD)
        row["poor"] = share(np.array(row["block_error"]) >= GOOD)
        print({key: value for key, value in row.items() if not key.startswith("block")}, flush=True)
    found = {
        "made_by": "benchmarks/reliability.py",
        "machine": machine(),
        "weights": WEIGHTS,
        "noise_of_the_stack_greys": round(own, 2),
        "poor_above": GOOD,
        "published_threshold": PUBLISHED,
        **ranked,
        "conditions": rows,
    }
    out.write_text(json.dumps(found, indent=2) + "\n")
    draw(found, picture)


def condition(truth: np.ndarray, kind: str, level: float, factor: int, times: int, own: float) -> dict[str, Any]:
    """Noise so that the stack has ``times`` its own; every ``factor``-th section."""
    rng = np.random.default_rng(0)
    sections = truth[::factor].astype(np.float32)
    sections += rng.normal(0, own * np.sqrt(times**2 - 1), sections.shape) if times > 1 else 0
    sections = np.clip(np.rint(sections), 0, 255).astype(np.uint8)
    with tempfile.TemporaryDirectory() as place:
        source, made = f"{place}/in.zarr", f"{place}/out.zarr"
        size = (VOXEL * factor, VOXEL, VOXEL)
        create_image(source, shape=sections.shape, dtype="uint8", voxel_size=size, chunk=(8, 64, 64))
        finish(write_units(open_array(source, 0, "w"), Box.of(sections.shape), sections))
        output = reconstruct(Request(input=source, out=made, weights=WEIGHTS, factor=factor, shard=(EDGE,) * 3))
        job = output.job()
        ledger = Ledger(Path(made), "", job.plan.grid)
        p99, spread = (of_blocks(field, job, ledger) for field in ("p99", "mean"))
        mean = open_volume(made, channel=0).read(Box.of(job.plan.region.shape)).astype(np.float32)
    true = truth[: len(mean)].astype(np.float32)
    missing = np.arange(len(mean)) % factor != 0
    errors = []
    for index in range(len(job.plan)):
        box = job.plan.write_box(index)
        part = box.slices()
        planes = missing[part[0]]
        errors.append(float(np.sqrt(np.mean((mean[part][planes] - true[part][planes]) ** 2))) / 255)
    return {
        "kind": kind,
        "level": level,
        "psnr": round(psnr(mean[missing], true[missing], 255.0), 2),
        "block_p99": [round(float(value), 4) for value in p99],
        "block_mean": [round(float(value), 4) for value in spread],
        "block_error": [round(error, 4) for error in errors],
    }


def share(flags: np.ndarray) -> float:
    return round(float(flags.mean()), 3)


def draw(found: dict[str, Any], picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    labels = {"noise": "noise, times the stack's own", "spacing": "section spacing, nm"}
    for place, kind in zip(axes, labels, strict=True):
        rows = [row for row in found["conditions"] if row["kind"] == kind]
        levels = [row["level"] for row in rows]
        for key, label in (
            ("poor", f"poor: error above {GOOD:g}"),
            ("flagged_published", f"flagged: 99th percentile above {PUBLISHED:g}"),
            ("flagged_ours", f"flagged: expected error above {GOOD:g}"),
        ):
            place.plot(levels, [100 * row[key] for row in rows], marker="o", label=label)
        place.set(xlabel=labels[kind], xticks=levels)
        place.grid(alpha=0.25)
    axes[0].set_ylabel("blocks, %")
    axes[0].legend(frameon=False)
    figure.savefig(picture)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
