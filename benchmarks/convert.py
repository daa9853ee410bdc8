"""`emdvol convert` and `export` against a plain tensorstore copy, in one run: MB/s, and peak memory for 4x the size.

    python benchmarks/convert.py benchmarks/results/convert.json

The source is an OME-Zarr of procedural EM. The plain copy writes the same bytes into the same shards with the same
codecs, shard after shard, as many in flight as ours; it makes no pyramid, which is a seventh more to write. Speed is in
MB of the source's voxels. Each measurement is a process of its own, timed without its imports; its peak resident size
is what the operating system reports. Rounds alternate and medians are compared.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics as stats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from emdiffuse_vol.geometry.boxes import Box, cell_box, cells_meeting
from emdiffuse_vol.stores.convert import convert
from emdiffuse_vol.stores.copying import WORKERS
from emdiffuse_vol.stores.export import export
from emdiffuse_vol.stores.image import open_array, stored_unit
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.phantom import PhantomVolume
from emdiffuse_vol.stores.volume import VolumeSpec

SHAPES = {"speed": (256, 512, 1024), "1x": (256, 1024, 1024), "4x": (512, 1024, 2048)}
FORMATS = ("ome-zarr", "ome-zarr-0.4", "n5", "precomputed", "hdf5", "tiff", "tiff-series")
# TIFF is written through a map of memory, whose pages the system counts as memory; N5 and OME-Zarr 0.4 are written as
# precomputed is.
MEASURED = ("ome-zarr", "precomputed", "hdf5")
ROUNDS = 2


class Tiled:
    """A phantom of 256 x 256 x 256 voxels, again and again: painting a large one would take minutes."""

    url, options = "tiled", {}

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.spec = VolumeSpec(shape, "uint8", (40.0, 8.0, 8.0))
        self.cube = PhantomVolume.of((256, 256, 256), (40.0, 8.0, 8.0)).read(Box.of((256, 256, 256)))

    def read(self, box: Box) -> Any:
        places = (range(a, b) for a, b in zip(box.start, box.stop, strict=True))
        z, y, x = ([i % 256 for i in place] for place in places)
        return self.cube[z][:, y][:, :, x]


def main(result: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, shape in SHAPES.items():
            convert(Tiled(shape), folder / f"{size}.zarr")
        speed: dict[str, list[float]] = {kind: [] for kind in ("plain copy", *FORMATS)}
        for _ in range(ROUNDS):
            for kind, found in speed.items():
                found.append(measure(folder, "speed", kind)["seconds"])
        peaks = {kind: {size: measure(folder, size, kind)["peak_bytes"] for size in ("1x", "4x")} for kind in MEASURED}
    megabytes = {size: z * y * x / 1e6 for size, (z, y, x) in SHAPES.items()}
    rate = {kind: megabytes["speed"] / stats.median(found) for kind, found in speed.items()}
    report = {
        "made_by": "benchmarks/convert.py",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "megabytes": {size: round(n) for size, n in megabytes.items()},
        "rounds": ROUNDS,
        "plain_copy_mb_per_second": round(rate["plain copy"], 1),
        "formats": {
            kind: {
                "mb_per_second": round(rate[kind], 1),
                "of_plain_copy": round(rate[kind] / rate["plain copy"], 3),
            }
            for kind in FORMATS
        },
        "peak_bytes": peaks,
        "peak_4x_over_1x": {kind: round(found["4x"] / found["1x"], 3) for kind, found in peaks.items()},
        "seconds": {kind: [round(s, 2) for s in found] for kind, found in speed.items()},
    }
    result.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def measure(folder: Path, size: str, kind: str) -> dict[str, float]:
    target = folder / ("target.h5" if kind == "hdf5" else "target")
    command = [sys.executable, __file__, "--one", kind, str(folder / f"{size}.zarr"), str(target)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    return found


def one(kind: str, source: str, target: str) -> None:
    """In a process of its own."""
    volume = open_volume(source)
    if kind == "plain copy":  # metadata are not what is measured
        shutil.copytree(source, target, ignore=lambda folder, names: ["c"])
    started = time.perf_counter()
    if kind == "plain copy":
        copy(source, target)
    else:
        export(volume, target, kind)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_bytes": peak()}))


def peak() -> int:
    """Of this process alone: what getrusage says begins with the memory of the process that started it."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def copy(source: str, target: str) -> None:
    read, write = open_array(source, cache_bytes=1 << 20), open_array(target, 0, "w")
    unit, whole, flying = stored_unit(write), Box.of(read.shape), []
    for cell in cells_meeting(whole, unit):
        part = (cell_box(cell, unit) & whole).slices()
        flying.append(write[part].write(read[part]).commit)
        if len(flying) > WORKERS:
            flying.pop(0).result()
    for future in flying:
        future.result()


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        one(*sys.argv[2:5])
    else:
        main(Path(sys.argv[1]))
