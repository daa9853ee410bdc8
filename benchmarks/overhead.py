"""What the engine costs beside the network: two ratios, each measured in one run.

    python benchmarks/overhead.py DATA/fib25_val benchmarks/results/overhead.json [identity|network]

Given one of the two, that one alone is measured and the other is kept as it stands in the file.

identity   blocks whose network copies the nearest section, through the real task, executor, drive and ledger, against a
           plain tensorstore copy of the same bytes into the same shards (both fsync every shard)
network    the default network end to end, against a bare loop of the same network over the same tiles, already in
           memory. Both with all cores, nothing else running

Rounds alternate between the two sides, and medians are compared. The pyramid is left out of both: a copy has none.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics as stats
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import torch
from skimage.io import imread

from emdiffuse_vol.executors import AHEAD
from emdiffuse_vol.executors.local import LocalExecutor
from emdiffuse_vol.geometry.boxes import Box, cell_box, cells_meeting
from emdiffuse_vol.reconstruct.drive import Drive, Halt
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.ledger import ALL, Ledger
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.plan import Block
from emdiffuse_vol.reconstruct.predict import Tile
from emdiffuse_vol.reconstruct.run import Prepared, prepare
from emdiffuse_vol.reconstruct.worker import BlockTask, Context
from emdiffuse_vol.stores.image import open_array, stored_unit, write_array, write_units
from emdiffuse_vol.stores.volume import read_mirrored

ROUNDS = 3
NETWORK_ROUNDS = 2  # a minute for each side of each


@dataclass(frozen=True)
class Identity(BlockTask):
    """Every plane is the section below it."""

    def codes(self, context: Context, block: Block, sections: Any) -> Any:
        below, *_ = context.plan.mode.axial.locate(np.arange(block.write.start[0], block.write.stop[0]))
        _, y, x = block.write.slices(block.read.start)
        result = np.zeros((2, *block.write.shape), sections.dtype)
        for plane, section in zip(result[0], below - block.read.start[0], strict=True):
            plane[...] = sections[section, y, x]
        return result


def main(data: Path, result: Path, only: str | None) -> None:
    volume = np.stack([imread(file) for file in sorted((data / "grayscale_maps").glob("*.png"))])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = json.loads(result.read_text()) if only else {}
        report |= {
            "made_by": "benchmarks/overhead.py",
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        }
        for part in (identity, network):
            if only in (None, part.__name__):
                report[part.__name__] = part(folder, volume)
    result.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def identity(folder: Path, volume: np.ndarray) -> dict[str, Any]:
    """52 sections of 1024 x 1024 pixels, made of copies of the volume's, to 511 planes."""
    tile = volume[::5][:52]
    stack = np.tile(tile, (1, *(-(-1024 // n) for n in tile.shape[1:])))[:, :1024, :1024]
    write(folder / "large.zarr", stack, (100.0, 10, 10))
    prepared = prepare(Request(input=str(folder / "large.zarr"), out=str(folder / "identity.zarr")))
    threads = torch.get_num_threads()
    ours, plain, read = [], [], 0
    for _ in range(ROUNDS):
        seconds, read = run(prepared, Identity(prepared.job, 1, threads))
        ours.append(seconds)
        plain.append(copy(folder / "identity.zarr", folder / "copy.zarr"))
    both = [open_array(str(folder / name), 0).read().result() for name in ("identity.zarr", "copy.zarr")]
    assert (both[0] == both[1]).all() and both[0].any()
    size = 2 * prepared.plan.region.size
    stored = sum(file.stat().st_size for file in (folder / "large.zarr" / "0").rglob("*") if file.is_file())
    return {
        "bytes": size,
        "blocks": len(prepared.plan),
        "engine_mb_per_second": round(size / stats.median(ours) / 1e6, 1),
        "copy_mb_per_second": round(size / stats.median(plain) / 1e6, 1),
        "ratio": round(stats.median(plain) / stats.median(ours), 3),
        "engine_seconds": [round(s, 3) for s in ours],
        "copy_seconds": [round(s, 3) for s in plain],
        "input_bytes_read_over_stored": round(read / stored, 3),
    }


def network(folder: Path, volume: np.ndarray) -> dict[str, Any]:
    """Default weights on 13 sections of 512 x 512 pixels, factor 5: 4 tiles of 64 x 256 x 256."""
    stack = np.tile(volume[:61:5], (1, 3, 3))[:, :512, :512]
    write(folder / "small.zarr", stack, (50.0, 10, 10))
    request = Request(input=str(folder / "small.zarr"), out=str(folder / "network.zarr"))
    prepared, threads = prepare(request), torch.get_num_threads()
    ours, bare = [], []
    for _ in range(NETWORK_ROUNDS):
        bare.append(loop(prepared))
        ours.append(run(prepared, BlockTask(prepared.job, 1, threads))[0])
    return {
        "voxels": prepared.plan.region.size,
        "engine_voxels_per_second": round(prepared.plan.region.size / stats.median(ours)),
        "bare_voxels_per_second": round(prepared.plan.region.size / stats.median(bare)),
        "ratio": round(stats.median(bare) / stats.median(ours), 3),
        "engine_seconds": [round(s, 2) for s in ours],
        "bare_seconds": [round(s, 2) for s in bare],
    }


def write(path: Path, greys: np.ndarray, voxel_size: tuple[float, float, float]) -> None:
    write_array(path, greys, voxel_size, chunk=(16, 128, 128))


def run(prepared: Prepared, task: BlockTask) -> tuple[float, int]:
    """Seconds of all blocks, from the first that is taken to the last that is recorded; bytes read of the input."""
    output = Output(Path(prepared.request.out))
    shutil.rmtree(output.path, ignore_errors=True)
    output.open_or_create(prepared, overwrite=False)
    ledger = Ledger(output.path, "", prepared.plan.grid)
    executor, read = LocalExecutor(1), []

    def notify(receipts: Any, in_flight: int, retried: int) -> None:
        read.extend(receipt.read_bytes for receipt in receipts)

    from emdiffuse_vol.reconstruct.worker import context_for

    context_for(prepared.job, task.permits, task.threads)  # the network is loaded once in a worker's life
    started = time.perf_counter()
    Drive(ledger, executor, lambda expected: task, ledger.take(ALL), output.log, Halt(), 60, notify).run()
    seconds = time.perf_counter() - started
    executor.close()
    assert ledger.complete
    return seconds, sum(read)


def copy(source: Path, target: Path) -> float:
    """As many shards in flight as the engine has blocks."""
    shutil.rmtree(target, ignore_errors=True)
    read = open_array(str(source), 0)
    shape = read.shape
    # The same metadata, so the same shards and codecs.
    shutil.copytree(source, target, ignore=lambda folder, names: ["c", "ledger"])
    array = open_array(str(target), 0, "w")
    unit, whole, flying = stored_unit(array), Box.of((shape[1], shape[2], shape[3])), []
    started = time.perf_counter()
    for cell in cells_meeting(whole, unit):
        z, y, x = cell_box(cell, unit).slices()
        inside = (cell_box(cell, unit) & whole).slices()
        flying.append(_copy_shard(array, read, (z, y, x), inside))
        while len(flying) > AHEAD:
            flying.pop(0).result()
    for future in flying:
        future.result()
    return time.perf_counter() - started


def _copy_shard(array: ts.TensorStore, read: ts.TensorStore, shard: Any, inside: Any) -> Any:
    if shard == inside:
        return array[(slice(None), *shard)].write(read[(slice(None), *inside)]).commit
    box = Box(tuple(s.start for s in inside), tuple(s.stop for s in inside))
    return write_units(array, box, read[(slice(None), *inside)].read().result())


def loop(prepared: Prepared) -> float:
    """The network alone, on every tile that the run computes."""
    plan, job = prepared.plan, prepared.job
    tiles = []
    for index in product(*(range(n) for n in np.ceil(np.array(plan.region.shape) / plan.tiling.core).astype(int))):
        box = plan.tiling.input_box(index)
        needed = plan.mode.read_box(box)
        below, t, *_ = plan.mode.axial.locate(np.arange(box.start[0], box.stop[0]))
        greys = job.grey_map.normalise(read_mirrored(prepared.volume, needed))
        tiles.append(Tile(box, greys, below - needed.start[0], t))
    started = time.perf_counter()
    for tile in tiles:
        prepared.predictor([tile])
    return time.perf_counter() - started


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
