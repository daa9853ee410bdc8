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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from volumes import file_hashes, small_request, smooth_volume, write_volume, write_weights

from emdiffuse_vol.errors import ClusterError, Stopped
from emdiffuse_vol.executors import slurm as slurm_executor
from emdiffuse_vol.executors.slurm import Slurm, on_slurm
from emdiffuse_vol.executors.walltime import OutOfTime
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.ledger import DONE, Ledger
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.run import reconstruct

ROOT = Path(__file__).parents[1]
MISSING = [
    name for name in ("sbatch", "slurmctld", "munged") if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: apt-get install slurm-wlm munge"),
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("slurm"),
]

WIDEST, BLOCKS = 1024, 96  # blocks of the volume, which no job of a minute could all make, and of most runs
LONG = 300.0  # seconds: on a machine where anything takes longer, all takes too long


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
    greys = smooth_volume((13, 60, 64 * BLOCKS))
    write_volume(folder / "in.zarr", np.resize(greys.T, (64 * WIDEST, 60, 13)).T, (50, 10, 10))
    write_weights(folder / "w.safetensors")
    return folder


@pytest.fixture(scope="module")
def unbroken(place: Path) -> dict[str, str]:
    """Hashes of a run on this machine."""
    request = ask(place, "unbroken")
    reconstruct(request)
    return file_hashes(request.out)


def ask(place: Path, name: str, blocks: int = BLOCKS, **settings: Any) -> Request:
    roi = f"0:13,0:60,0:{64 * blocks}"
    return small_request(place, out=str(place / f"{name}.zarr"), roi=roi, members=2, device="cpu", **settings)


def jobs_of(place: Path, **settings: Any) -> dict[str, Any]:
    shared = {"cores": 2, "memory": "4GB", "walltime": "00:10:00", "interface": "lo", "log_directory": str(place)}
    return {**shared, **settings}


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """``emdvol reconstruct`` in a process of its own; after the test, nothing that it began is left."""
    drivers: list[subprocess.Popen[str]] = []

    def start(request: Request, cluster: dict[str, Any], *flags: str) -> subprocess.Popen[str]:
        file = Path(request.out).with_suffix(".json")
        file.write_text(json.dumps(cluster))
        command = [sys.executable, "-m", "emdiffuse_vol", "--quiet", "reconstruct", request.input, "--out", request.out]
        command += ["--weights", request.weights, "--shard", "64,64,64", "--tile", "64,64,64", "--members", "2"]
        command += ["--roi", str(request.roi), "--device", "cpu", "--cluster", str(file), *flags]
        drivers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()
        driver.communicate()
    slurm("scancel", "--user", str(os.getuid()))
    until(nothing_queued)


def start_array(request: Request, tasks: str, **options: str) -> str:
    """pipelines/slurm/array.sh on an output that exists -> the id of the job."""
    given = {
        "array": tasks,
        "gres": "gpu:1",
        "cpus-per-task": "1",
        "mem": "1G",
        "output": f"{request.out}.log",
        **options,
    }
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


def until(condition: Callable[[], Any], driver: subprocess.Popen[str] | None = None) -> Any:
    """What a condition gives once it holds. driver: without which it never will."""
    deadline = time.monotonic() + LONG
    while not (found := condition()):
        if driver is not None and driver.poll() is not None and not (found := condition()):
            pytest.fail(f"the driver ended too early: {finished(driver)}")
        if time.monotonic() > deadline:
            pytest.fail(f"it never happened; jobs: {queue()}; nodes:\n{slurm('sinfo', '-N', '-l')}")
        time.sleep(0.1)
    return found


def nothing_queued() -> bool:
    return not queue()


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Status of a driver that has ended, and what it said."""
    _, said = process.communicate(timeout=800)
    return process.returncode, said.strip()


def done_blocks(request: Request) -> list[int]:
    output = Path(request.out)
    return Ledger(output, "", Output(output).job().plan.grid).numbers(DONE) if output.exists() else []


def done(request: Request) -> int:
    return len(done_blocks(request))


def running() -> list[str]:
    return [job for job, state in queue().items() if state == "RUNNING"]


def node_of(job: str) -> str:
    return slurm("squeue", "--noheader", "--job", job, "--format", "%N")


def test_a_run_outlives_a_scancel_a_requeue_and_a_dead_node(
    lab: Path, place: Path, start: Start, unbroken: dict[str, str]
) -> None:
    request, before = ask(place, "struck"), set(ended(lab))
    driver = start(request, jobs_of(place, jobs=2, gres="gpu:2"))
    seen: set[str] = set()

    def victim(blocks: int) -> str:
        """The older of two jobs that run, once so many blocks are in."""
        until(lambda: done(request) >= blocks and len(running()) == 2, driver)
        seen.update(queue())
        return min(running(), key=int)

    def replaced() -> bool:
        return bool(queue().keys() - seen)

    slurm("scancel", victim(1))
    until(replaced, driver)
    slurm("scontrol", "requeue", victim(5))
    until(replaced, driver)
    node = node_of(victim(9))
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    until(replaced, driver)
    assert finished(driver) == (0, "")
    slurm("scontrol", "update", f"nodename={node}", "state=resume")
    assert file_hashes(request.out) == unbroken and Output(Path(request.out)).sealed
    until(nothing_queued)
    assert len(ended(lab).keys() - before) == 5, "two jobs, and one more for each that was struck"


def test_blocks_of_jobs_that_replace_those_whose_walltime_is_up_are_the_same_bytes(
    lab: Path, place: Path, start: Start, unbroken: dict[str, str]
) -> None:
    """An array and a driver with jobs of a minute, of which the first spend a third before they begin."""
    driven, worked = ask(place, "driven", WIDEST), ask(place, "worked", WIDEST, executor="none")
    before, prologue = set(ended(lab)), place / "prologue.sh"
    prologue.write_text("sleep 20")
    reconstruct(worked)
    array = start_array(worked, "0-0", time="00:01:00", export=f"ALL,BASH_ENV={prologue}")
    cluster = jobs_of(place, cores=1, walltime="00:01:00", prologue=[f". {prologue}"])
    driver = start(driven, cluster)
    until(lambda: done(driven) and done(worked), driver)
    prologue.write_text("")

    until(lambda: "PENDING" in ended(lab).get(array, []))  # it has put itself back into the queue
    until(lambda: ended(lab).keys() - before - {array}, driver)
    first = done(driven), done(worked)
    until(lambda: done(driven) > first[0] and done(worked) > first[1], driver)
    driver.terminate()
    assert finished(driver)[0] == Stopped.exit_status
    slurm("scancel", array)
    until(nothing_queued)
    states = {state for job, states in ended(lab).items() if job not in before for state in states}
    assert states <= {"COMPLETED", "PENDING", "CANCELLED"}, "none has ended because SLURM ended it"
    made = [file_hashes(request.out) for request in (driven, worked)]
    both = made[0].keys() & made[1].keys()
    assert len(both) > min(first) and all(made[0][name] == made[1][name] for name in both)
    inner = both & {f"0/c/0/0/0/{number}" for number in range(BLOCKS - 1)}  # the last block of a volume sees its face
    assert inner and all(made[0][name] == unbroken[name] for name in inner)
    for request in (driven, worked):
        assert not [event for event in Output(Path(request.out)).events() if event["event"] in ("retry", "failed")]


def test_an_array_and_drivers_that_are_ended_in_turn_go_on_with_each_others_run(
    lab: Path, place: Path, start: Start, unbroken: dict[str, str]
) -> None:
    request, cluster = ask(place, "relay", executor="none"), jobs_of(place, gres="gpu:1")
    reconstruct(request)
    array = start_array(request, "0-1")  # the job of its last task has the array's own number
    until(lambda: {number * 2 // BLOCKS for number in done_blocks(request)} == {0, 1})  # both are at work
    (first,) = queue().keys() - {array}
    slurm("scancel", "--signal=TERM", "--full", f"{array}_1")
    until(lambda: "PENDING" in ended(lab).get(array, []))  # it has put itself back into the queue
    slurm("scancel", array)
    until(nothing_queued)
    assert ended(lab)[first] == ["CANCELLED"], "neither requeued with the other, nor back after a scancel"

    before = done(request)
    driver = start(request, cluster)
    until(lambda: done(request) > before, driver)
    (job,) = queue()
    driver.send_signal(signal.SIGTERM)
    assert finished(driver) == (Stopped.exit_status, "Error: stopped by SIGTERM; the same command continues")
    until(nothing_queued)
    assert ended(lab)[job] == ["CANCELLED"]

    before = done(request)
    driver = start(request, cluster)
    until(lambda: done(request) > before, driver)
    driver.kill()
    driver.wait()
    until(nothing_queued)  # workers see that it is gone

    assert before < done(request) < BLOCKS
    start_array(request, "0-2")
    until(nothing_queued)
    assert Output(Path(request.out)).sealed and file_hashes(request.out) == unbroken


def test_workers_of_a_job_have_a_gpu_each_and_the_job_ends_with_them(place: Path) -> None:
    def task(number: int) -> None:
        raise OutOfTime

    executor = on_slurm(Slurm(**jobs_of(place, gres="gpu:2")))
    try:
        until(lambda: executor.processes() == 2)
        job, gpus = running(), executor.client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
        assert sorted(gpus.values()) == ["0", "1"]
        for number in range(12):
            executor.submit(task, number)
        until(lambda: queue().keys() - job)
        assert not queue().keys() & job
    finally:
        executor.close()
    until(nothing_queued)


def test_a_cluster_that_gives_no_workers_is_left_after_a_while(lab: Path, place: Path, start: Start) -> None:
    request, before = ask(place, "patient"), set(ended(lab))
    slurm("scontrol", "update", "nodename=n[1-3]", "state=drain", "reason=test")
    try:
        driver = start(request, jobs_of(place, jobs=3), "--patience", "0.05")
        status, said = finished(driver)
    finally:
        slurm("scontrol", "update", "nodename=n[1-3]", "state=resume")
    assert status == Stopped.exit_status
    assert said.startswith("Error: there has been no worker for 0.05 min") and "\n" not in said
    until(nothing_queued)
    assert len(ended(lab).keys() - before) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"partition": "nope"}, "does not take the jobs of --cluster: .*[Ii]nvalid partition.*; correct that"),
        ({"gres": "gpu:3", "cores": 3}, "does not take the jobs of --cluster: .*node configuration is not available"),
        ({"gres": "tpu:1"}, "does not take the jobs of --cluster: .*[Ii]nvalid generic resource"),
        ({"extra": ["--nope"]}, "does not take the jobs of --cluster: .*unrecognized option '--nope'"),
        ({"prologue": ["exit 1"]}, "jobs of --cluster end before their workers arrive; see /.*/slurm"),
    ],
    ids=["partition", "too many GPUs", "no such resource", "option", "prologue"],
)
def test_jobs_that_cannot_be_are_said_to_be_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(slurm_executor, "BARREN", 3)
    with pytest.raises(ClusterError, match=said):
        reconstruct(ask(place, "never", cluster=Slurm(**jobs_of(place, **settings))))
    assert not queue()


def test_a_slurm_that_does_not_answer_is_said_to_be_so(
    lab: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (lab / "slurm.conf").read_text()
    (tmp_path / "slurm.conf").write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", text))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(
        ClusterError, match=r"does not take the jobs of --cluster: .*Unable to contact slurm controller"
    ):
        reconstruct(ask(place, "never", cluster=Slurm(**jobs_of(place))))


def test_workers_without_a_gpu_stop_a_run_that_needs_them(place: Path) -> None:
    request = small_request(place, out=str(place / "cuda.zarr"), cluster=Slurm(**jobs_of(place, gres="gpu:1")))
    with pytest.raises(
        ClusterError, match=r"the worker on \S+ has no CUDA device and the run is for cuda; ask for a GPU"
    ):
        reconstruct(request)
    until(nothing_queued)
