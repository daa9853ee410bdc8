"""Peak memory of `emdvol reconstruct` on a volume and on one four times larger, beside what the plan predicted.

    python benchmarks/memory.py benchmarks/results/memory.json

Input is the procedural phantom. Each run is a process of its own, whose peak resident size the operating system
reports. The last one may not have more than 2 GB of memory to write to, as on a host that has no more.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.run import prepare
from emdiffuse_vol.stores.convert import convert
from emdiffuse_vol.stores.phantom import PhantomVolume

HOST, HOST_BYTES = "in 2 GB", 2_000_000_000
# Small tiles and shards, so that there are 4 and 16 blocks to go through in two minutes; and the default ones, once.
SMALL = {"tile": (64, 128, 128), "shard": (64, 128, 128)}
RUNS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "1x": ((26, 128, 256), SMALL),
    "4x": ((51, 256, 256), SMALL),
    "default tile": ((13, 256, 256), {}),
    HOST: ((13, 256, 256), {}),
}


def main(result: Path) -> None:
    rows = {
        name: measure(shape, settings, HOST_BYTES if name == HOST else resource.RLIM_INFINITY)
        for name, (shape, settings) in RUNS.items()
    }
    report = {
        "made_by": "benchmarks/memory.py",
        "machine": platform.machine(),
        "runs": rows,
        "peak_4x_over_1x": round(rows["4x"]["peak_bytes"] / rows["1x"]["peak_bytes"], 3),
        "predicted_over_peak": {n: round(row["predicted_bytes"] / row["peak_bytes"], 3) for n, row in rows.items()},
    }
    result.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def measure(shape: tuple[int, int, int], settings: dict[str, Any], limit: int) -> dict[str, Any]:
    url = f"phantom:{'x'.join(map(str, shape))}?voxel_size=50,10,10&seed=0"
    flags = [part for key, value in settings.items() for part in (f"--{key}", ",".join(map(str, value)))]
    with tempfile.TemporaryDirectory() as folder:
        stack, out = str(Path(folder) / "in.zarr"), str(Path(folder) / "out.zarr")
        convert(PhantomVolume.from_url(url), stack)
        plan = prepare(Request(input=stack, out=out, **settings)).summary()
        code = (
            "import resource, subprocess, sys\n"
            f"resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))\n"
            "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
        )
        command = [sys.executable, "-c", code, sys.executable, "-m", "emdiffuse_vol", "reconstruct", stack]
        command += ["--out", out, *flags]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "output_shape": plan["output"]["shape"],
        "blocks": plan["blocks"],
        "peak_bytes": peak,
        "predicted_bytes": plan["memory_bytes"],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
