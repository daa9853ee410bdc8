"""How fast: the whole command, the bare network, the hardware's own limit and the published recipe, in one run.

    python benchmarks/throughput.py benchmarks/results/throughput.json [--shape 13,512,512] [--precision float32]

On a GPU where there is one, else on the CPU. The input is the procedural phantom, five output planes for each of its
sections; default weights and settings.

    command      ``emdvol reconstruct`` as a process of its own: from its start to a sealed output with its pyramid
    network      the predictor alone: what nothing around it can make faster
    split        one block after the other, nothing overlapped: read, network, host (greys, spread, codes) and write
    peak         products of large square matrices in the network's precision: the FLOP/s that this hardware has
    published    evaluations of the published U-Net on 256 x 256 pixels, float32. Its recipe takes 200 of them for each
                 of 2 samples, of tiles that advance by 224 pixels: that is multiplied out, not run

``ratios`` compare seconds of the clock on a GPU, and of the processor on a CPU (``cpu``, all threads together), which
others who use the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from predictions import rounded

from emdiffuse_vol import __version__
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.reconstruct.device import Device
from emdiffuse_vol.reconstruct.estimate import hardware
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.predict import Tile, predict_block
from emdiffuse_vol.reconstruct.run import Prepared, prepare
from emdiffuse_vol.stores.convert import convert
from emdiffuse_vol.stores.image import finish, open_array, write_units
from emdiffuse_vol.stores.phantom import PhantomVolume
from emdiffuse_vol.stores.volume import read_mirrored

STEPS, SAMPLES, SIDE, STRIDE = 200, 2, 256, 224  # of the published recipe
REPEATS = 3  # timed, after one that is not
PRODUCT = {"cpu": 2048, "cuda": 8192}  # side of the matrices
PUBLISHED_BATCH = {"cpu": 1, "cuda": 8}


@dataclass
class Clock:
    """Seconds of the clock and of the processor, by name."""

    device: Device
    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.device.wait()
        self.wall[name] = self.wall.get(name, 0) + time.perf_counter() - wall
        self.cpu[name] = self.cpu.get(name, 0) + time.process_time() - cpu

    def seconds(self, name: str) -> float:
        """What ratios are made of."""
        return (self.cpu if self.device.name == "cpu" else self.wall)[name]


class Timed:
    """A predictor whose calls are timed and counted."""

    def __init__(self, predictor: Any, clock: Clock) -> None:
        self.predictor, self.clock, self.tiles = predictor, clock, 0

    def __call__(self, tiles: list[Tile]) -> Any:
        self.tiles += len(tiles)
        with self.clock.time("network"):
            return self.predictor(tiles)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.predictor, name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="13,512,512")
    parser.add_argument("--precision", default="auto")
    given = parser.parse_args()
    report = rounded(measure(given.shape, given.precision))
    given.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def measure(shape: str, precision: str = "auto") -> dict[str, Any]:
    """shape: sections, height and width of the input, with commas."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        stack, out = str(Path(folder) / "in.zarr"), str(Path(folder) / "out.zarr")
        url = f"phantom:{shape.replace(',', 'x')}?voxel_size=50,10,10&seed=0"
        convert(PhantomVolume.from_url(url), stack)
        prepared = prepare(Request(input=stack, out=out, precision=precision))
        device = Device(prepared.job.device, prepared.job.precision)
        clock = Clock(device)
        memory = run_command(prepared, clock)
        tiles = run_blocks(prepared, clock)
    voxels, flop = prepared.plan.region.size, tiles * prepared.predictor.flops()
    product, evaluation = matmul(device, clock), published(device.name, clock)
    recipe = STRIDE**2 / (evaluation * STEPS * SAMPLES)
    clock.wall["host"], clock.cpu["host"] = (c["blocks"] - c["network"] for c in (clock.wall, clock.cpu))
    parts = ("read", "network", "host", "write")
    return {
        "made_by": "benchmarks/throughput.py",
        "emdiffuse_vol": __version__,
        "torch": torch.__version__,
        "hardware": hardware(device.name),
        "load_before": load,
        "precision": device.precision,
        "input": shape,
        "voxels": voxels,
        "tile": prepared.plan.tiling.core,
        "flop_per_voxel_of_a_tile": prepared.predictor.flops() / tile_voxels(prepared),
        "command": {"wall": clock.wall["command"], "cpu": clock.cpu["command"], "peak_bytes": memory},
        "predicted_bytes": prepared.memory_bytes,
        "split": {name: {"wall": clock.wall[name], "cpu": clock.cpu[name]} for name in parts},
        "mvoxel_per_second": {name: voxels / clock.wall[name] / 1e6 for name in ("command", "network")},
        "mvoxel_per_cpu_second": {name: voxels / clock.cpu[name] / 1e6 for name in ("command", "network")},
        "gflop_per_second": {"network": flop / clock.seconds("network") / 1e9, "matmul": product / 1e9},
        "published": {"seconds_per_evaluation": evaluation, "voxels_per_second": recipe},
        "ratios": {
            "command_over_network": clock.seconds("network") / clock.seconds("command"),
            "network_over_matmul": flop / clock.seconds("network") / product,
            "command_over_published": voxels / clock.seconds("command") / recipe,
            "network_over_published": voxels / clock.seconds("network") / recipe,
        },
    }


def tile_voxels(prepared: Prepared) -> int:
    z, y, x = prepared.plan.tiling.core
    return z * y * x


def run_command(prepared: Prepared, clock: Clock) -> int:
    """-> peak memory in bytes."""
    request = prepared.request
    command = [sys.executable, "-m", "emdiffuse_vol", "reconstruct", request.input, "--out", request.out]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--precision", request.precision], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, status
    clock.wall["command"], clock.cpu["command"] = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    return usage.ru_maxrss * 1024


def run_blocks(prepared: Prepared, clock: Clock) -> int:
    """All blocks again, over those that the command has written; -> tiles that the network computed."""
    plan, job = prepared.plan, prepared.job
    target, predictor = open_array(job.out, 0, "w"), Timed(prepared.predictor, clock)
    for index in range(len(plan)):
        block = plan[index]
        with clock.time("read"):
            sections = read_mirrored(prepared.volume, block.read)
        with clock.time("blocks"):
            codes = predict_block(plan, block, predictor, sections, job.grey_map, job.scales)
        with clock.time("write"):
            finish(write_units(target, block.write.shift(plan.offset), codes))
    return predictor.tiles


def matmul(device: Device, clock: Clock) -> float:
    """FLOP/s."""
    kind = torch.device(device.name).type
    side, dtype = PRODUCT[kind], torch.bfloat16 if device.precision == "bfloat16" else torch.float32
    a, b = (torch.rand(side, side, device=device.name, dtype=dtype) for _ in range(2))
    return 2 * side**3 / repeated(lambda: a @ b, "matmul", clock)


@torch.inference_mode()
def published(device: str, clock: Clock) -> float:
    """Seconds of one evaluation."""
    batch = PUBLISHED_BATCH[torch.device(device).type]
    net = UNet(in_channels=3, slices=True).eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last)
    level, number = torch.full((batch,), 0.5, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    return repeated(lambda: net(images, level, number), "published", clock) / batch


def repeated(work: Callable[[], Any], name: str, clock: Clock) -> float:
    """Seconds of a call."""
    work()
    with clock.time(name):
        for _ in range(REPEATS):
            work()
    return clock.seconds(name) / REPEATS


if __name__ == "__main__":
    main()
