"""Clusters without a cluster: job scripts as text, walltimes, and what goes wrong said in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from distributed import LocalCluster
from volumes import file_hashes, small_request, smooth_volume, write_volume, write_weights

from emdiffuse_vol import __version__
from emdiffuse_vol.cli.main import main
from emdiffuse_vol.config import load_request
from emdiffuse_vol.errors import ClusterError, ConfigError, EmdvolError, Stopped
from emdiffuse_vol.executors import dask, gpu, slurm, walltime
from emdiffuse_vol.executors.dask import on_scheduler, on_this_machine, run_here
from emdiffuse_vol.executors.slurm import Slurm
from emdiffuse_vol.executors.walltime import OutOfTime, check_time, seconds_left
from emdiffuse_vol.reconstruct.engine import work
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.ledger import ALL
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.run import prepare, reconstruct

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may themselves run in a job."""
    for name in (*walltime.END, *walltime.BEGIN, "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an input whose output is 11 x 60 x 100 voxels, in two blocks."""
    folder = tmp_path_factory.mktemp("cluster")
    write_volume(folder / "in.zarr", smooth_volume((3, 60, 100)), (50, 10, 10))
    write_weights(folder / "w.safetensors")
    return folder


def ask(place: Path, name: str = "out", **settings: Any) -> Request:
    return small_request(place, out=str(place / f"{name}.zarr"), members=2, **settings)


def script_of(settings: Slurm) -> list[str]:
    cluster = slurm.make_cluster(settings)
    try:
        return [line for line in cluster.job_script().splitlines() if line]
    finally:
        cluster.close()


def test_job_script_asks_for_what_the_cluster_file_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shown = load_request(None, {"input": "i", "out": "o", "cluster": str(ROOT / "configs/slurm-gpu.json")}).cluster
    assert shown is not None and shown.interface == "ib0"
    script = script_of(Slurm(**{**vars(shown), "interface": "lo", "python": "/env/bin/python"}))
    worker = script.pop()
    assert script == [
        "#!/usr/bin/env bash",
        "#SBATCH -J emdvol",
        "#SBATCH -e slurm-logs/emdvol-%J.err",
        "#SBATCH -o slurm-logs/emdvol-%J.out",
        "#SBATCH -p gpu",
        "#SBATCH -A my-lab",
        "#SBATCH -n 1",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --mem=90G",
        "#SBATCH -t 08:00:00",
        "#SBATCH --gres=gpu:2",
        "#SBATCH --constraint=a100",
        "export EMDVOL_BEGIN=$(date +%s)",
        "export EMDVOL_DEADLINE=$((EMDVOL_BEGIN + 28800))",
        "module load cuda",
    ]
    assert re.fullmatch(
        r"/env/bin/python -m distributed.cli.dask_worker tcp://127.0.0.1:\d+ --name dummy-name --nthreads 3 "
        r"--memory-limit \S+ --nworkers 2 --nanny --death-timeout 60 "
        r"--preload emdiffuse_vol.executors.gpu --memory-limit 0 --no-dashboard --interface lo",
        worker,
    )


def test_job_script_without_settings_runs_one_worker_in_the_environment_of_the_driver() -> None:
    *script, worker = script_of(Slurm(interface="lo"))
    assert "#SBATCH --cpus-per-task=4" in script and "#SBATCH -t 24:00:00" in script
    assert not any(word in "\n".join(script) for word in ("-p ", "-A ", "gres"))
    assert worker.startswith(f"{sys.executable} -m distributed.cli.dask_worker ") and "--nworkers" not in worker


def test_every_line_of_the_array_script_that_slurm_reads_stands_before_the_first_command() -> None:
    lines = (ROOT / "pipelines/slurm/array.sh").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert options == [line for line in lines[:first] if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in options
    assert f"AGAIN={Stopped.exit_status} " in "\n".join(lines)


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        (None, 0),
        ("gpu", 1),
        ("gpu:2", 2),
        ("gpu:a100", 1),
        ("gpu:a100:4", 4),
        ("gpu:1g.5gb:3", 3),
        ("gpu:a100:2(S:0-1)", 2),
        ("gpu:a100:1,gpu:v100:2", 3),
        ("nvme:1,gpu:2", 2),
        ("tmpgpu:7", 0),
        ("craynetwork:4", 0),
    ],
)
def test_gpus_of_a_job_are_those_of_its_gres(gres: str | None, gpus: int) -> None:
    assert Slurm(gres=gres).gpus == gpus
    assert Slurm(gres=gres).workers == max(1, gpus)
    assert Slurm(gres=gres, processes=3).workers == 3


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:01:00", 60), ("2:00:00", 7200), ("168:00:00", 604800), ("1-02:03:04", 93784)]
)
def test_walltimes_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert Slurm(walltime=text).seconds == seconds


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"jobs": 0}, "cluster.jobs is 0; at least 1 is needed"),
        ({"processes": 0}, "cluster.processes is 0"),
        ({"cores": 1, "gres": "gpu:2"}, "cluster.cores is 1 for 2 workers in a job; give one core each"),
        ({"walltime": "60"}, "cluster.walltime is '60', expected HH:MM:SS or D-HH:MM:SS"),
        ({"walltime": "00:00:00"}, "must be above 0"),
        ({"memory": "much"}, "cluster.memory is 'much', expected a size such as 64GB"),
        (
            {"gress": "gpu:2"},
            r"setting 'cluster.gress' is unknown; known: jobs, cores, memory, walltime, [^;]*, extra$",
        ),
        ({"cores": "many"}, "setting 'cluster.cores': .*integer.*, found 'many'"),
        ({"prologue": "module load cuda"}, "setting 'cluster.prologue': .*found 'module load cuda'"),
        ([], r"slurm.json holds a list, expected an object"),
        ("{", r"slurm.json is not JSON"),
    ],
)
def test_cluster_files_that_say_nothing_we_know_are_refused(
    place: Path, tmp_path: Path, settings: object, said: str
) -> None:
    request = ask(place, "refused")
    file = tmp_path / "slurm.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    result = CliRunner().invoke(
        main, ["reconstruct", request.input, "--out", request.out, "--weights", request.weights, "--cluster", str(file)]
    )
    assert result.exit_code == 1 and re.search(said, result.stderr.strip()), result.stderr
    assert "\n" not in result.stderr.strip() and not Path(request.out).exists()


def test_gpu_run_on_jobs_without_gpu_is_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match="--device cuda and the jobs of --cluster have no GPU; add gres"):
        prepare(ask(place, cluster=Slurm(), device="cuda"))


def test_the_device_of_a_run_is_that_of_its_jobs_and_not_of_this_machine(place: Path) -> None:
    assert prepare(ask(place, cluster=Slurm(gres="gpu:1"))).job.device == "cuda"
    assert prepare(ask(place, cluster=Slurm())).job.device == "cpu"


def test_a_machine_without_sbatch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="there is no sbatch on this machine"):
        slurm.on_slurm(Slurm())


def test_an_interface_that_is_none_is_named_with_those_that_are() -> None:
    with pytest.raises(ClusterError, match=r"'ib77' is not a valid network interface.*lo.*see interface in --cluster"):
        slurm.make_cluster(Slurm(interface="ib77"))


def test_what_slurm_says_is_passed_on_and_nothing_else() -> None:
    text = (
        "Command exited with non-zero exit code.\nExit code: 1\nCommand:\nsbatch /tmp/tmp1.sh\nstdout:\n\nstderr:\n"
        "sbatch: error: invalid partition specified: gpu\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n\n"
    )
    assert slurm._words(text) == (
        "invalid partition specified: gpu; Batch job submission failed: Invalid partition name specified"
    )


# GPUs


@pytest.mark.parametrize(
    ("visible", "name", "chosen"),
    [
        ("0,1", "emdvol-0-0", "0"),
        ("0,1", "emdvol-7-1", "1"),
        ("2,5", "emdvol-7-1", "5"),
        ("0,1", "emdvol-0-3", "1"),
        ("GPU-8ad2,MIG-77", "emdvol-0-0", "GPU-8ad2"),
        ("3", "emdvol-12", "3"),
        ("0,1", "1", "1"),
        ("0,1", "a-worker", None),
        ("", "emdvol-0-0", None),
    ],
)
def test_each_process_of_a_job_has_its_own_gpu(monkeypatch, visible: str, name: str, chosen: str | None) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu.gpu_of(name) == chosen


# Time


def test_a_task_starts_only_if_it_will_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    check_time(1e9)  # nothing is known of an end
    monkeypatch.setenv("EMDVOL_DEADLINE", str(time.time() + 100))
    check_time(59)
    with pytest.raises(OutOfTime, match=r"^(99|100) s are left, and a block takes 61 s"):
        check_time(61)
    monkeypatch.setenv("EMDVOL_DEADLINE", str(time.time() + 5))
    with pytest.raises(OutOfTime):
        check_time(0)


def test_jobs_too_short_for_any_block_stop_the_run_and_are_not_replaced_for_ever(monkeypatch) -> None:
    now = time.time()
    monkeypatch.setenv("EMDVOL_BEGIN", str(now - 5))
    monkeypatch.setenv("EMDVOL_DEADLINE", str(now + 55))
    check_time(29)
    with pytest.raises(ClusterError, match="a block takes 40 s, which needs 70 s, and jobs last 60 s"):
        check_time(40)
    monkeypatch.setenv("EMDVOL_BEGIN", str(now - 30))  # it had the time for some
    with pytest.raises(OutOfTime):
        check_time(40)


def test_the_environment_is_believed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 1000))
    assert 999 < (seconds_left() or 0) <= 1000
    monkeypatch.setenv("EMDVOL_DEADLINE", str(time.time() + 10))
    assert 9 < (seconds_left() or 0) <= 10
    monkeypatch.setenv("EMDVOL_DEADLINE", "18:30")
    with pytest.raises(ConfigError, match="EMDVOL_DEADLINE is '18:30', expected seconds since 1970"):
        seconds_left()


def test_an_older_slurm_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "squeue").write_text(
        '#!/bin/sh\n[ "$3" = 11 ] && date -d "100 seconds" +%Y-%m-%dT%H:%M:%S || echo N/A\n'
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    assert 97 < (seconds_left() or 0) <= 100
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert seconds_left() is None
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert seconds_left() is None


def test_a_worker_without_time_ends_with_status_75_and_others_finish(place: Path) -> None:
    request = ask(place, "worked", executor="none")
    path = Path(request.out)
    reconstruct(request)
    late = {**os.environ, "EMDVOL_DEADLINE": str(time.time())}
    command = [sys.executable, "-m", "emdiffuse_vol", "--quiet", "work", request.out]
    ended = subprocess.run(command, check=False, env=late, capture_output=True, text=True)
    assert ended.returncode == Stopped.exit_status
    assert ended.stderr == (
        "Error: stopped by the walltime (0 s are left, and a block takes 0 s); the same command continues\n"
    )
    work(path, 1, (1, 2), False, lambda progress: None)
    assert not Output(path).sealed
    reconstruct(ask(place, "worked"))  # a driver finishes what workers began
    assert Output(path).sealed
    whole = ask(place, "whole")
    reconstruct(whole)
    assert file_hashes(path) == file_hashes(whole.out)
    assert work(path, 1, ALL, False, lambda progress: None).sealed


@pytest.mark.parametrize("executor", ["local", "dask"])
def test_a_driver_whose_own_time_is_up_stops_as_well(place: Path, executor: str, monkeypatch) -> None:
    monkeypatch.setenv("EMDVOL_DEADLINE", str(time.time() + 8))
    with pytest.raises(Stopped, match=r"stopped by the walltime \(\d+ s are left, .*; the same command continues"):
        reconstruct(ask(place, executor, executor=executor))


# A dask scheduler that somebody else has started


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster:
        yield cluster.scheduler_address


def start_worker(scheduler: str, before: str = "", **environment: str) -> subprocess.Popen[bytes]:
    """A worker in whose process ``before`` is executed first."""
    run = "from distributed.cli.dask_worker import main; main()"
    command = [sys.executable, "-c", f"{before}\n{run}", scheduler, "--no-nanny", "--nthreads", "3", "--no-dashboard"]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def test_a_scheduler_that_does_not_answer_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "CONNECT", 1.0)
    for address, why in (
        ("tcp://127.0.0.1:9", "no dask scheduler answers"),
        ("nonsense://", "no dask scheduler answers"),
    ):
        with pytest.raises(ClusterError, match=f"{why} at {address}, expected such as tcp://host:8786"):
            reconstruct(ask(place, scheduler=address))


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (
            "import emdiffuse_vol; emdiffuse_vol.__version__ = '0.0'",
            r"the worker at \S+ has emdiffuse_vol 0.0, the driver \S+; give both the same environment",
        ),
        (
            "import importlib.metadata as m; of = m.version; "
            "m.version = lambda name: '0.0' if name == 'tensorstore' else of(name)",
            r"the worker on \S+ has tensorstore 0.0, the driver \S+;",
        ),
        (
            "import sys; sys.modules['emdiffuse_vol'] = None",
            r"the worker at \S+ has emdiffuse_vol not \(.*\), the driver",
        ),
    ],
    ids=["another version", "another library", "without the package"],
)
def test_workers_of_other_software_stop_the_run(scheduler: str, place: Path, before: str, said: str) -> None:
    worker = start_worker(scheduler, before)
    try:
        with pytest.raises(ClusterError, match=said):
            reconstruct(ask(place, scheduler=scheduler, patience=0.5))
    finally:
        worker.kill()
        worker.wait()


def test_a_worker_whose_time_is_up_ends_its_blocks_and_goes(scheduler: str) -> None:
    def task(number: int) -> int:
        check_time(0 if number == 0 else 3600)
        time.sleep(3 if number == 0 else 0)
        return os.getpid()

    executor, ended = on_scheduler(scheduler, __version__), {}
    late, other = start_worker(scheduler, EMDVOL_DEADLINE=str(time.time() + 1800)), None
    try:
        for number in (0, 1):
            executor.submit(task, number)
        while 0 not in ended:
            ended |= {outcome.number: outcome for outcome in executor.wait(1)}
        assert ended[0].result == late.pid  # not killed by the other's refusal, which came first
        assert list(ended) == [1, 0] and isinstance(ended[1].error, OutOfTime)
        assert late.wait(30) == 0 and executor.processes() == 0
        executor.submit(task, 1)
        other = start_worker(scheduler)
        while ended[1].error:
            ended |= {outcome.number: outcome for outcome in executor.wait(1)}
        assert ended[1].result == other.pid
    finally:
        executor.close()
        for worker in (late, other):
            if worker is not None:
                worker.kill()
                worker.wait()


def test_a_run_without_workers_stops_after_its_patience(scheduler: str, place: Path) -> None:
    with pytest.raises(Stopped, match=r"there has been no worker for 0.02 min, .*the same command continues"):
        reconstruct(ask(place, "patient", scheduler=scheduler, patience=0.02))


def test_a_scheduler_that_goes_during_a_run_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "CONNECT", 1.0)
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster:
        executor = on_scheduler(cluster.scheduler_address, __version__)
        executor.submit(abs, 1)
    with pytest.raises(ClusterError, match=r"the scheduler at \S+ is gone; start it, then the same command again"):
        while True:
            executor.wait(0.1)
    executor.close()


def test_errors_that_cannot_travel_arrive_as_words() -> None:
    class Local(Exception):
        pass

    def task(number: int) -> None:
        raise Local("of this place") if number else ClusterError("of ours")

    assert isinstance(run_here(task, 0, True)[1], EmdvolError)
    _, error, trace = run_here(task, 1, True)
    assert type(error) is RuntimeError and str(error) == "Local: of this place" and "Traceback" in trace


def test_a_cluster_of_ours_is_not_that_of_other_dask_computations() -> None:
    from dask import config

    executor = on_this_machine(1)
    try:
        assert config.get("scheduler", None) is None
    finally:
        executor.close()
