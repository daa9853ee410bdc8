"""Runs on a real SLURM: three nodes of two fake GPUs each, started here (``slurmlab.sh``). Whatever befalls jobs, and
however arrays and drivers follow each other, the bytes are those of an unbroken run on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from volumes import file_hashes, small_request, smooth_volume, write_volume, write_weights

from emdiffuse_vol.errors import ClusterError, OutputError, Stopped
from emdiffuse_vol.executors.slurm import Slurm, on_slurm
from emdiffuse_vol.executors.walltime import OutOfTime
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.ledger import Ledger
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.run import reconstruct

ROOT = Path(__file__).parents[1]
MISSING = [name for name in ("sbatch", "slurmctld", "munged") if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: apt-get install slurm-wlm munge"),
]

WIDEST, BLOCKS = 128, 24  # blocks of the volume, and of most runs


@pytest.fixture(scope="module", autouse=True)
def lab() -> Iterator[Path]:
    """The folder of a SLURM that sbatch and its like, here and in processes started here, talk to."""
    folder = Path(tempfile.mkdtemp(prefix="emdvol-slurm-"))  # not pytest's: names of sockets must be short
    script = ROOT / "tests" / "slurmlab.sh"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "lab" / "slurm.conf"))
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        try:
            subprocess.run([script, "start", folder / "lab", "3", "2"], check=True)
            yield folder / "lab"
        finally:
            subprocess.run([script, "stop", folder / "lab"], check=False)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    write_volume(folder / "in.zarr", smooth_volume((13, 60, 64 * WIDEST)), (50, 10, 10))
    write_weights(folder / "w.safetensors")
    return folder


@pytest.fixture(scope="module")
def unbroken(place: Path) -> tuple[dict[str, str], float]:
    """Hashes of a run on this machine, and the seconds of a core that one of its blocks takes."""
    request, started = ask(place, "unbroken"), time.process_time()
    reconstruct(request)
    return file_hashes(request.out), (time.process_time() - started) / BLOCKS


def ask(place: Path, name: str, blocks: int = BLOCKS, **settings: Any) -> Request:
    roi = f"0:13,0:60,0:{64 * blocks}"
    return small_request(place, out=str(place / f"{name}.zarr"), roi=roi, members=2, device="cpu", **settings)


def jobs_of(place: Path, **settings: Any) -> dict[str, Any]:
    shared = {"cores": 2, "memory": "1GB", "walltime": "00:10:00", "interface": "lo", "log_directory": str(place)}
    return {**shared, **settings}


def start(request: Request, cluster: dict[str, Any], *flags: str) -> subprocess.Popen[str]:
    """``emdvol reconstruct`` in a process of its own."""
    file = Path(request.out).with_suffix(".json")
    file.write_text(json.dumps(cluster))
    command = [sys.executable, "-m", "emdiffuse_vol", "reconstruct", request.input, "--out", request.out]
    command += ["--weights", request.weights, "--shard", "64,64,64", "--tile", "64,64,64", "--members", "2"]
    command += ["--roi", str(request.roi), "--device", "cpu", "--cluster", str(file), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def start_array(request: Request, tasks: str, **options: str) -> str:
    """pipelines/slurm/array.sh on an output that exists -> the id of the job."""
    given = {"array": tasks, "gres": "gpu:1", "cpus-per-task": "1", "mem": "1G", "output": f"{request.out}.log", **options}
    command = ["sbatch", "--parsable", *(f"--{key}={value}" for key, value in given.items())]
    return slurm(*command, str(ROOT / "pipelines" / "slurm" / "array.sh"), request.out)


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def queue() -> dict[str, str]:
    """Jobs that have not ended, by id, with their states."""
    return dict(line.split() for line in slurm("squeue", "--noheader", "--format", "%A %T").splitlines())


def ended(lab: Path) -> dict[str, list[str]]:
    """States in which jobs have ended, or left their nodes, by id."""
    found: dict[str, list[str]] = {}
    for line in (lab / "log" / "jobs.txt").read_text().splitlines():
        match = re.match(r"JobId=(\d+) .* JobState=(\w+)", line)
        assert match is not None
        found.setdefault(match[1], []).append(match[2])
    return found


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """What a condition gives once it holds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.2)
    return found


def done(request: Request) -> int:
    try:
        return Ledger(Path(request.out), "", (1, 1, BLOCKS)).finished
    except OutputError:  # not created yet
        return 0


def running() -> list[str]:
    return [job for job, state in queue().items() if state == "RUNNING"]


def test_a_run_outlives_a_scancel_a_requeue_and_a_dead_node(lab: Path, place: Path, unbroken: Any) -> None:
    request, before = ask(place, "struck"), len(ended(lab))
    driver = start(request, jobs_of(place, jobs=2, gres="gpu:2"))
    seen: set[str] = set()

    def strike(blocks: int, *command: str) -> None:
        """At a job that has done something, once that many blocks are in; then wait for its replacement."""
        until(lambda: done(request) >= blocks and len(running()) == 2)
        job = min(running(), key=int)
        seen.update(queue())
        node = slurm("squeue", "--noheader", "--job", job, "--format", "%N")
        slurm(*(part.format(job=job, node=node) for part in command))
        until(lambda: set(queue()) - seen)

    strike(1, "scancel", "{job}")
    strike(5, "scontrol", "requeue", "{job}")
    strike(9, "scontrol", "update", "nodename={node}", "state=down", "reason=test")
    assert driver.wait(200) == 0, driver.stderr and driver.stderr.read()
    slurm("scontrol", "update", "nodename=n[1-3]", "state=resume")
    assert file_hashes(request.out) == unbroken[0] and Output(Path(request.out)).sealed
    assert not until(lambda: not queue()) is None
    assert len(ended(lab)) - before == 5, "two jobs, and one for each that was struck"
