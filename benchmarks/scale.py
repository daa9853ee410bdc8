"""The engine on a run of a million blocks: driver memory, overhead per block, ledger, restart, status.

    python benchmarks/scale.py benchmarks/results/scale.json [--blocks-per-side 100]

Input is the procedural phantom, which costs nothing to open at any size; each block is a task that does nothing, run
by the real executor (threads), the real drive and the real ledger on disk. A first process is killed (SIGKILL) when
half of the blocks are recorded; a second takes up the rest, as `emdvol work` does. The pyramid is left out:
its blocks do the reading and writing that this run is without.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import click
import numpy as np
import psutil

SHARD = (64, 256, 256)
FACTOR = 10
STARTED = psutil.Process().create_time()


@dataclass(frozen=True)
class Nothing:
    """A block that is done as soon as it begins."""

    def __call__(self, index: int) -> object:
        from emdiffuse_vol.reconstruct.ledger import Receipt

        return Receipt(index, seconds=0.001, p99=1.0, mean=0.5, checksum=index)


def drive(folder: Path, stop_at: int | None) -> None:
    """One driver. Prints what it measured as JSON; with stop_at, kills itself when so many blocks are recorded."""
    from emdiffuse_vol.executors.local import LocalExecutor
    from emdiffuse_vol.reconstruct.drive import Drive, Halt
    from emdiffuse_vol.reconstruct.ledger import ALL, Ledger, Receipt
    from emdiffuse_vol.reconstruct.output import Output

    output = Output(folder / "iso.zarr")
    ledger = Ledger(output.path, "", output.job().plan.grid)  # as `emdvol work` begins
    executor, memory, process = LocalExecutor(1), [], psutil.Process()
    before, at_start, first = ledger.finished, time.time(), 0.0

    def notify(receipts: list[Receipt], in_flight: int, retried: int) -> None:
        nonlocal first
        if receipts and not first:
            first = time.time()
        if not memory or time.time() > at_start + memory[-1][0] + 1:
            done = ledger.finished
            memory.append((time.time() - at_start, done, process.memory_info().rss))
            if stop_at is not None and done >= stop_at:
                (folder / "first.json").write_text(json.dumps(memory))
                os.kill(os.getpid(), signal.SIGKILL)

    state = Drive(ledger, executor, lambda expected: Nothing(), ledger.take(ALL), output.log, Halt(), 60, notify)
    state.run()
    seconds = time.time() - at_start
    print(
        json.dumps(
            {
                "blocks": len(ledger),
                "finished_before": before,
                "finished": ledger.finished,
                "seconds": seconds,
                "seconds_per_block": seconds / max(1, ledger.finished - before),
                "restart_seconds": first - STARTED,
                "memory": memory,
                "cpu_seconds": sum(process.cpu_times()[:2]),
            }
        )
    )


def create(folder: Path, side: int) -> float:
    """An output of side^3 blocks, empty. Returns the seconds it took."""
    from emdiffuse_vol.reconstruct import output as outputs
    from emdiffuse_vol.reconstruct.job import Request
    from emdiffuse_vol.reconstruct.run import prepare

    started = time.perf_counter()
    z, y, x = (side * n for n in SHARD)
    source = f"phantom:{z // FACTOR}x{y}x{x}?voxel_size=50,5,5"
    prepared = prepare(Request(input=source, out=str(folder / "iso.zarr"), shard=SHARD))
    assert len(prepared.plan) == side**3
    with patch.object(outputs, "check_resources"):  # nothing is written, so no disk is needed
        outputs.Output(folder / "iso.zarr").open_or_create(prepared, overwrite=False)
    return time.perf_counter() - started


@click.command()
@click.argument("result", type=click.Path(path_type=Path))
@click.option("--blocks-per-side", "side", default=100)
@click.option("--plot", type=click.Path(path_type=Path), help="PNG of the driver's memory over its blocks.")
@click.option("--as-driver", type=click.Path(path_type=Path), hidden=True)
@click.option("--stop-at", type=int, hidden=True)
def main(result: Path, side: int, plot: Path | None, as_driver: Path | None, stop_at: int | None) -> None:
    if as_driver is not None:
        drive(as_driver, stop_at)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        create_seconds = create(folder, side)
        command = [sys.executable, __file__, str(result), "--as-driver", name]
        killed = subprocess.run([*command, "--stop-at", str(side**3 // 2)], check=False).returncode
        assert killed == -signal.SIGKILL, f"the first driver was to be killed, it ended with {killed}"
        first = json.loads((folder / "first.json").read_text())
        second = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        started = time.perf_counter()
        status = [sys.executable, "-m", "emdiffuse_vol", "status", str(folder / "iso.zarr"), "--json"]
        shown = json.loads(subprocess.run(status, check=True, capture_output=True, text=True).stdout)
        status_seconds = time.perf_counter() - started
        ledger_files = [f for f in (folder / "iso.zarr" / "ledger").rglob("*") if f.is_file()]
        on_disk = sum(f.stat().st_blocks * 512 for f in ledger_files)
        ledger_bytes = sum(f.stat().st_size for f in ledger_files)
    assert shown["stages"]["blocks"]["done"] == side**3
    memory = second.pop("memory")
    after_start = [rss for _, done, rss in memory if done > second["finished_before"] + side**3 // 20]
    report = {
        "made_by": "benchmarks/scale.py",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "blocks": side**3,
        "create_seconds": round(create_seconds, 2),
        "killed_at": first[-1][1],
        "recorded_at_restart": second["finished_before"],
        "restart_seconds": round(second["restart_seconds"], 2),
        "milliseconds_per_block": round(1e3 * second["seconds_per_block"], 4),
        "status_seconds": round(status_seconds, 2),
        "ledger_bytes": ledger_bytes,
        "ledger_bytes_on_disk": on_disk,
        "ledger_files": len(ledger_files),
        "driver_peak_bytes": max(rss for _, _, rss in memory),
        "driver_growth_bytes": int(np.max(after_start) - np.min(after_start)) if after_start else None,
        "driver_memory": [[done, rss] for _, done, rss in memory[:: max(1, len(memory) // 60)]],
    }
    result.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "driver_memory"}, indent=2))
    if plot is not None:
        draw(plot, first, memory)


def draw(path: Path, first: list[list[float]], second: list[list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3))
    for run, label in ((first, "first driver, killed"), (second, "second driver")):
        axes.plot([done / 1e3 for _, done, _ in run], [rss / 1e6 for *_, rss in run], label=label)
    axes.set(xlabel="thousand blocks recorded", ylabel="resident memory of the driver, MB", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
