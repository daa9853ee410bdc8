"""What `emdvol plan` says of the volumes this project is meant for, with the speed measured on the machine at hand.

    python benchmarks/scale_plans.py benchmarks/results/scale_plans.json

Nothing is read or written: the volumes are imagined, at the sizes that their authors give. One calibration serves all
plans, as their tiles are the same. A few tiles are timed, which takes a minute or two without a GPU; run it while the
machine does nothing else. `docs/scale.md` explains the numbers.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from emdiffuse_vol import __version__
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.reconstruct.estimate import ImaginedVolume, calibrate, estimate
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.noise import NoiseField
from emdiffuse_vol.reconstruct.run import Prepared, prepare_volume

# name: shape, voxel size in nm, settings other than the default
VOLUMES: dict[str, tuple[tuple[int, int, int], tuple[float, float, float], dict[str, Any]]] = {
    # A cube of 1 mm at the resolution at which MICrONS publishes its images.
    "MICrONS": ((25_000, 125_000, 125_000), (40, 8, 8), {}),
    "MICrONS, large blocks": ((25_000, 125_000, 125_000), (40, 8, 8), {"block": (1024, 1024, 1024)}),
    # The same cube at the resolution at which it was imaged.
    "MICrONS, 4 nm": ((25_000, 250_000, 250_000), (40, 4, 4), {}),
    # Size of the aligned volume, version 4: see docs/scale.md.
    "FANC": ((4_390, 223_232, 83_968), (45, 4.3, 4.3), {"factor": "450/43"}),
}
# What is not measured here. H100 and H200: dense bfloat16, by their data sheets.
GPU_PEAK, GPU_SHARES = 990e12, (0.4, 0.1)
# 200 steps of 103.8 GFLOP on tiles of 256 x 256 that advance by 224, for each of 2 samples.
PUBLISHED = 103.8e9 * 200 * 2 / 224**2
# Trivial tasks a second through a dask scheduler with two local workers, on the machine this was written on.
SCHEDULER = (270, 620)


def main(result: Path) -> None:
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"this machine is busy (load {load:.1f}): times will be too long", file=sys.stderr)
    plans = {name: prepare(*volume) for name, volume in VOLUMES.items()}
    first = next(iter(plans.values()))
    speed = calibrate(first)
    report = {
        "made_by": "benchmarks/scale_plans.py",
        "emdiffuse_vol": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "load_before": load,
        "noise_seconds_per_tile": noise_seconds(first),
        "assumed": {
            "gpu_peak_flops": GPU_PEAK,
            "gpu_shares": GPU_SHARES,
            "published_flop_per_voxel": PUBLISHED,
            "scheduler_tasks_per_second": SCHEDULER,
        },
        "plans": {name: {**plan.summary(), "estimate": estimate(plan, speed)} for name, plan in plans.items()},
    }
    result.write_text(json.dumps(report, indent=2) + "\n")
    for name, plan in report["plans"].items():
        print(name, f"{plan['blocks']:,} blocks", f"{plan['estimate']['device_hours']:.3g} device-hours")


def prepare(shape: tuple[int, int, int], voxel_size: tuple[float, float, float], settings: dict[str, Any]) -> Prepared:
    volume = ImaginedVolume.of(shape, voxel_size)
    return prepare_volume(Request(input=volume.url, out="", voxel_size=voxel_size, **settings), volume)


def noise_seconds(prepared: Prepared) -> float:
    """Of one core, for the noise of all members of a tile."""
    box, members = Box.of(prepared.plan.tiling.shape), prepared.request.members
    NoiseField(0).normal(members, 0, box, channels=2)
    started = time.perf_counter()
    for member in range(members):
        NoiseField(0).normal(member, 0, box, channels=2)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(Path(sys.argv[1]))
