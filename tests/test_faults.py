"""Law 8, kill anywhere: a fixed part of the trials of benchmarks/faults.py, and what earlier trials have found."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from faults import KINDS, Bench, attempt
from volumes import file_hashes, small_request

from emdiffuse_vol.errors import ConfigError, OutputError
from emdiffuse_vol.reconstruct.engine import work
from emdiffuse_vol.reconstruct.ledger import ALL, DONE, Ledger, Receipt
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.presence import Announcer, Presence, announced, drivers
from emdiffuse_vol.reconstruct.run import prepare
from emdiffuse_vol.reconstruct.worker import BlockTask
from emdiffuse_vol.stores.metadata import read_attributes, write_attributes

# A kind and a seed decide all that happens in a trial.
TRIALS = [(kind, 0) for kind in KINDS]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "seed"), TRIALS, ids=str)
def test_a_struck_run_continued_by_the_same_command_ends_as_an_unbroken_one(
    request: pytest.FixtureRequest, kind: str, seed: int
) -> None:
    if why := KINDS[kind].lacking():
        pytest.skip(why)
    row = attempt(request.getfixturevalue("bench"), kind, seed)
    assert row["result"] == "identical", "\n".join(row["problems"])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_a_driver_that_is_slow_to_create_continues_what_a_faster_one_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, overwrite: bool
) -> None:
    request = small_request(tmp_path / "in", out=str(tmp_path / "place" / "out.zarr"))
    path, prepared = Path(request.out), prepare(request)
    if overwrite:
        Output(path).open_or_create(prepare(small_request(tmp_path / "in", out=request.out, seed=1)), False)
    fill: Callable[..., None] = Output._fill

    def slow_fill(self: Output, place: Path, prepared: object) -> None:
        monkeypatch.setattr(Output, "_fill", fill)  # the other driver is undisturbed
        if when == "after":
            fill(self, place, prepared)
        Output(path).open_or_create(prepared, overwrite)
        Ledger(path, "", (2, 1, 2)).record([Receipt(1, state=DONE)])
        if when == "before":
            fill(self, place, prepared)

    monkeypatch.setattr(Output, "_fill", slow_fill)
    Output(path).open_or_create(prepared, overwrite)
    assert Ledger(path, "", (2, 1, 2)).finished == 1
    assert [p.name for p in path.parent.iterdir()] == ["out.zarr"]


def test_what_a_killed_start_left_beside_the_output_is_removed_by_the_next(tmp_path: Path) -> None:
    request = small_request(tmp_path / "in", out=str(tmp_path / "place" / "out.zarr"))
    path, prepared = Path(request.out), prepare(request)
    for left in (".out.zarr.new-1234", ".out.zarr.old"):
        (path.parent / left / "0").mkdir(parents=True)
    Output(path).open_or_create(prepared, False)
    assert [p.name for p in path.parent.iterdir()] == ["out.zarr"]
    (path.parent / ".out.zarr.old").mkdir()  # a kill between the two names of --overwrite
    Output(path).open_or_create(prepared, False)
    assert [p.name for p in path.parent.iterdir()] == ["out.zarr"]


def test_a_worker_that_outlives_its_run_writes_nothing_in_the_output_of_another(tmp_path: Path) -> None:
    request = small_request(tmp_path / "in", out=str(tmp_path / "out.zarr"))
    output, mine = Output(Path(request.out)), prepare(request)
    output.open_or_create(mine, False)
    task = BlockTask(mine.job, 1, 1)
    task(0)
    output.open_or_create(prepare(replace(request, seed=1)), True)
    with pytest.raises(ConfigError, match="belongs to another run by now: seed is 1 there, 0 here"):
        task(1)
    assert list(file_hashes(request.out)) == ["0/zarr.json"]


@pytest.mark.parametrize("name", ["torch", "numpy", "tensorstore"])
def test_an_output_begun_with_other_software_is_not_continued(tmp_path: Path, name: str) -> None:
    request = small_request(tmp_path / "in", out=str(tmp_path / "out.zarr"))
    output, prepared = Output(Path(request.out)), prepare(request)
    output.open_or_create(prepared, False)
    output.open_or_create(prepared, False)  # the same software goes on
    attributes = read_attributes(output.path)
    attributes["emdvol"]["provenance"]["software"][name] = "0.1"
    write_attributes(output.path, attributes)
    for continued in (
        lambda: output.open_or_create(prepared, False),
        lambda: work(output.path, 1, ALL, False, lambda progress: None),
    ):
        with pytest.raises(OutputError, match=rf"{name} is 0.1 there, \S+ here; use the same"):
            continued()
    output.open_or_create(prepared, True)  # replaced
    output.check_software()
    output.seal()
    attributes["emdvol"]["sealed"] = True
    write_attributes(output.path, attributes)
    output.open_or_create(prepared, False)  # nothing is left to compute


def test_an_output_that_is_being_made_is_not_replaced(tmp_path: Path) -> None:
    request = small_request(tmp_path / "in", out=str(tmp_path / "out.zarr"))
    output = Output(Path(request.out))
    output.open_or_create(prepare(request), False)
    other = prepare(replace(request, seed=1))
    with (
        announced(output.path, "local", "0/1", None),
        pytest.raises(OutputError, match=rf"is being made by process {os.getpid()} on .*; stop that"),
    ):
        output.open_or_create(other, True)
    assert output.attributes["fingerprint"]["seed"] == 0
    output.open_or_create(other, True)
    assert output.attributes["fingerprint"]["seed"] == 1


def test_a_driver_that_was_killed_is_not_taken_for_one_at_work(tmp_path: Path) -> None:
    request = small_request(tmp_path / "in", out=str(tmp_path / "out.zarr"))
    output = Output(Path(request.out))
    output.open_or_create(prepare(request), False)
    killed = subprocess.Popen(["true"])
    killed.wait()
    folder = output.path / "ledger" / "drivers"
    folder.mkdir()
    Announcer(folder, Presence(platform.node(), killed.pid, "local", "0/1")).update(force=True)
    Announcer(folder, Presence("elsewhere", killed.pid, "local", "0/1")).update(force=True)
    assert [driver.host for driver in drivers(output.path) if driver.live] == ["elsewhere"]
    with announced(output.path, "local", "0/1", None):
        assert {driver.host for driver in drivers(output.path)} == {"elsewhere", platform.node()}
        assert len(drivers(output.path)) == 2
