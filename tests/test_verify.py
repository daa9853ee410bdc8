"""`emdvol status` and `verify`: what they say is what is on disk and in the ledger."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from volumes import file_hashes, small_request, smooth_volume, write_volume

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.cli.status import block_map as draw
from emdiffuse_vol.errors import OutputError
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.ledger import BRIDGED, DONE, FAILED, PENDING, SKIPPED, Ledger, Receipt
from emdiffuse_vol.reconstruct.presence import Announcer, Presence, announced, drivers
from emdiffuse_vol.reconstruct.run import reconstruct
from emdiffuse_vol.reconstruct.status import block_map, read_status
from emdiffuse_vol.reconstruct.verify import verify


@pytest.fixture
def request_of(tmp_path: Path) -> Request:
    """Two blocks and a level with one block above them."""
    request = small_request(tmp_path)
    write_volume(tmp_path / "wide.zarr", smooth_volume((2, 20, 300)), (50, 10, 10))
    request = Request(
        input=str(tmp_path / "wide.zarr"),
        out=request.out,
        weights=request.weights,
        shard=(64, 64, 192),
        tile=(8, 20, 192),
    )
    reconstruct(request)
    return request


def test_an_undamaged_output_is_verified(request_of: Request) -> None:
    total, wrong = verify(Path(request_of.out))
    assert (total, wrong) == (2 + 1, [])


def damage(out: Path, how: str) -> str:
    """-> the stage that is hit"""
    match how:
        case "shard lost":
            (out / "0/c/0/0/0/1").unlink()
        case "shard cut":
            path = out / "0/c/0/0/0/1"
            path.write_bytes(path.read_bytes()[:-100])
        case "shard of another block":
            (out / "0/c/0/0/0/1").write_bytes((out / "0/c/0/0/0/0").read_bytes())
        case "level lost":
            (out / "1/c/0/0/0/0").unlink()
    return "level 1" if how.startswith("level") else "blocks"


@pytest.mark.parametrize("how", ["shard lost", "shard cut", "shard of another block", "level lost"])
def test_damage_is_found_repaired_and_made_again_as_it_was(request_of: Request, how: str) -> None:
    out = Path(request_of.out)
    before = file_hashes(out)
    stage = damage(out, how)
    total, wrong = verify(out)
    assert [mismatch.what for mismatch in wrong] == [stage]
    assert read_status(out).sealed, "looking changes nothing"
    assert CliRunner().invoke(main, ["verify", str(out)]).exit_code == 1
    found = CliRunner().invoke(main, ["--quiet", "verify", str(out), "--json"])
    assert found.exit_code == 1 and [wrong["why"] for wrong in json.loads(found.stdout)["wrong"]]
    assert CliRunner().invoke(main, ["verify", str(out), "--repair"]).exit_code == 0
    assert not read_status(out).sealed
    reconstruct(request_of)
    assert file_hashes(out) == before
    assert verify(out) == (total, [])


def test_status_counts_states_and_needs_an_output_of_ours(request_of: Request, tmp_path: Path) -> None:
    out = Path(request_of.out)
    ledger = Ledger(out, "", (1, 1, 2))
    ledger.record([Receipt(1, state=FAILED, tries=3)])
    found = read_status(out)
    assert found.stages[0].counts == {"pending": 0, "done": 1, "skipped": 0, "bridged": 0, "failed": 1}
    assert found.failed == [1] and found.tries == 3 and found.stages[0].finished == 1
    shown = json.loads(CliRunner().invoke(main, ["status", str(out), "--json"]).output)
    assert shown["failed"] == [1]
    text = CliRunner().invoke(main, ["status", str(out)]).output
    assert "1 of 2 (50.0%)" in text and "set aside" in text and "!!" in text
    with pytest.raises(OutputError, match="is no output"):
        read_status(tmp_path)


def test_status_imports_no_torch(request_of: Request) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path\n"
        "from emdiffuse_vol.reconstruct.status import read_status\n"
        f"read_status(Path({request_of.out!r}))\n"
        "assert not {'torch', 'dask'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_block_map_shows_progress_failures_and_what_is_outside() -> None:
    state = np.full((2, 40, 120), DONE, np.uint8)
    state[0, :2, :2] = PENDING
    state[:, 10:12, 20:22] = SKIPPED
    state[1, 39, 119] = FAILED
    state[1, 30, 60] = BRIDGED
    cells = block_map(state)
    assert cells.shape == (20, 60)
    assert cells[0, 0] == 0.5 and cells[1, 1] == 1 and cells[15, 30] == 1
    assert np.isnan(cells[5, 10]) and cells[19, 59] == -1
    assert block_map(np.zeros((1, 1, 3), np.uint8)).tolist() == [[0, 0, 0]]


def test_block_map_is_drawn_row_by_row(request_of: Request) -> None:
    lines = draw(read_status(Path(request_of.out)))
    assert [line.plain for line in lines[1:]] == ["████"]


def test_drivers_announce_themselves_and_leave(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    folder = tmp_path / "ledger" / "drivers"
    with announced(tmp_path, "local", "0/1", None):
        assert [driver.live for driver in drivers(tmp_path)] == [True]
        stale = Announcer(folder, Presence("gone", 1, "local", "0/1"))
        stale.update(force=True)
        silent = json.loads(stale.path.read_text()) | {"updated": 0.0}
        stale.path.write_text(json.dumps(silent))
        assert sorted(driver.live for driver in drivers(tmp_path)) == [False, True]
        with announced(tmp_path, "dask", "0/1", None):  # removes what a killed one left
            assert all(driver.live for driver in drivers(tmp_path))
    assert not list(folder.glob("gone*"))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("shape", [(5, 7, 9), (40, 8, 10)])
def test_statistics_of_a_block_are_those_of_sorting_it(dtype: str, shape: tuple[int, int, int]) -> None:
    from emdiffuse_vol.reconstruct.worker import statistics

    codes = np.random.default_rng(0).gamma(2, 20, shape).clip(0, 255).astype(dtype)
    p99, mean = statistics(codes)
    assert p99 == np.percentile(codes, 99, method="inverted_cdf")
    assert mean == pytest.approx(codes.mean(dtype=np.float64))
