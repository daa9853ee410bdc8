"""Peak memory of `emdvol reconstruct` on a volume and on one four times larger, beside what the plan predicted.

    python benchmarks/memory.py benchmarks/results/memory.json

Input is the procedural phantom, computed as it is read, so no large file is needed. Each run is a process of its own,
whose peak resident size the operating system reports.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.run import prepare

SHAPES = {"1x": (26, 256, 512), "4x": (51, 512, 512)}


def main(result: Path) -> None:
    rows = {name: measure(shape) for name, shape in SHAPES.items()}
    report = {
        "made_by": "benchmarks/memory.py",
        "machine": platform.machine(),
        "runs": rows,
        "peak_4x_over_1x": round(rows["4x"]["peak_bytes"] / rows["1x"]["peak_bytes"], 3),
        "predicted_over_peak": {
            name: round(row["predicted_bytes"] / row["peak_bytes"], 3) for name, row in rows.items()
        },
    }
    result.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def measure(shape: tuple[int, int, int]) -> dict[str, Any]:
    url = f"phantom:{'x'.join(map(str, shape))}?voxel_size=50,10,10&seed=0"
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.zarr")
        plan = prepare(Request(input=url, out=out)).summary()
        code = (
            "import resource, subprocess, sys\n"
            "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
        )
        command = [sys.executable, "-c", code, sys.executable, "-m", "emdiffuse_vol", "reconstruct", url, "--out", out]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "output_shape": plan["output"]["shape"],
        "blocks": plan["blocks"],
        "peak_bytes": peak,
        "predicted_bytes": plan["memory_bytes"],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
