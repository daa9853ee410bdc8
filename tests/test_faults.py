"""Law 8, kill anywhere: a fixed part of the trials of benchmarks/faults.py, and what earlier trials have found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from faults import KINDS, Bench, attempt
from volumes import small_request

from emdiffuse_vol.reconstruct.ledger import DONE, Ledger, Receipt
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.run import prepare

# A kind and a seed decide all that happens in a trial.
TRIALS = [(kind, 0) for kind in KINDS]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
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
