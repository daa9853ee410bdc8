"""`emdvol report`: a page that needs nothing else, whose numbers are those of the ledger and of the volumes."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from volumes import read, run, small_request, smooth_volume, write_volume

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.errors import GeometryError, InputError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.metrics.interpolation import linear
from emdiffuse_vol.reconstruct.ledger import BRIDGED, DONE, FAILED, PENDING, SKIPPED, Receipt
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.viewing.crops import Shown, before, choose_point, made_at, open_input, sampled_uncertainty, slab
from emdiffuse_vol.viewing.history import BROKEN, MADE, OUTSIDE, UNMADE, History, Stretch, paced, project, read_history

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """71 x 60 x 100 voxels in 2 x 1 x 2 blocks, made by the whole engine."""
    folder = tmp_path_factory.mktemp("run")
    run(small_request(folder))
    write_volume(folder / "truth.zarr", smooth_volume((71, 60, 100), seed=3), (10, 10, 10))
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "out.zarr", tmp_path / "out.zarr"))


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def made(output: Path, out: Path, *more: object) -> tuple[str, dict]:
    """-> page and numbers"""
    result = report(output, "--out", out / "report.html", *more)
    assert result.exit_code == 0, result.output
    return (out / "report.html").read_text(), json.loads((out / "report.json").read_text())


def pictures(page: str) -> dict[str, np.ndarray]:
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page)
    assert len(found) == page.count("<img")
    return {alt: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, alt in found}


def test_page_stands_alone_and_its_pictures_show_something(folder: Path, tmp_path: Path) -> None:
    page, _ = made(folder / "out.zarr", tmp_path, "--truth", folder / "truth.zarr")
    assert not re.search(r"<script|<link|@import|url\(|(src|href)=\"(?!data:image/png)", page)
    shown = pictures(page)
    for plane in ("XY", "XZ", "YZ"):
        for kind in ("Input, nearest section", "Linear interpolation", "Reconstruction", "Uncertainty", "Truth"):
            assert shown.pop(f"{plane}, {kind}").std() > 3, (plane, kind)
    assert len(shown) == 7
    assert all(image.std() > 3 for image in shown.values())


def test_panels_are_the_voxels(folder: Path, tmp_path: Path) -> None:
    page, numbers = made(folder / "out.zarr", tmp_path, "--at", "33,20,71", "--size", 48)
    assert numbers["point"] == [33, 20, 71]
    low, high = Shown(folder / "out.zarr").job.greys
    mean = read(folder / "out.zarr")[0].astype(float)
    shown = pictures(page)
    for plane, greys in (
        ("XY", mean[33, 0:48, 47:95]),
        ("XZ", mean[9:57, 20, 47:95]),
        ("YZ", mean[9:57, 0:48, 71]),
    ):
        expected = ((greys - low) / (high - low)).clip(0, 1) * 255
        np.testing.assert_allclose(shown[f"{plane}, Reconstruction"], expected, atol=1)


def test_numbers_are_those_of_the_ledger(folder: Path, tmp_path: Path) -> None:
    page, numbers = made(folder / "out.zarr", tmp_path, "--threshold", 0.05)
    ledger = Shown(folder / "out.zarr").ledger
    p99 = ledger.read("p99") / 255
    threshold = float(np.unique(p99)[:2].mean())
    assert numbers["reliability"]["reliable_blocks"] == (p99 < 0.05).sum()
    assert numbers["reliability"]["block_p99"]["largest"] == pytest.approx(p99.max())
    _, split = made(folder / "out.zarr", tmp_path, "--threshold", threshold)
    reliable = int((p99 == p99.min()).sum())
    assert 0 < reliable < 4
    assert split["reliability"]["reliable_blocks"] == reliable
    assert split["reliability"]["reliable_share"] == reliable / 4
    assert numbers["stages"]["blocks"] == {"pending": 0, "done": 4, "skipped": 0, "bridged": 0, "failed": 0}
    assert numbers["complete"] and "not complete" not in page
    assert numbers["throughput"]["voxels_accounted_for"] == 71 * 60 * 100
    assert numbers["provenance"]["fingerprint"] == Output(folder / "out.zarr").attributes["fingerprint"]


def test_sample_holds_predicted_voxels_only(folder: Path) -> None:
    shown = Shown(folder / "out.zarr")
    values, codes = sampled_uncertainty(shown), read(folder / "out.zarr")[1].astype(np.float32)
    predicted = np.arange(71) % 5 != 0
    # Blocks of one chunk: the whole volume is the sample.
    np.testing.assert_allclose(np.sort(values), np.sort(codes[predicted].ravel() / 8))
    assert len(sampled_uncertainty(shown, boxes=2)) < len(values)


def test_scores_are_those_of_evaluate(folder: Path, tmp_path: Path) -> None:
    page, numbers = made(folder / "out.zarr", tmp_path, "--truth", folder / "truth.zarr")
    arguments = ["evaluate", folder / "out.zarr", folder / "truth.zarr", "--json", tmp_path / "s.json"]
    assert CliRunner().invoke(main, list(map(str, arguments))).exit_code == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert numbers["scores"]["reconstruction"] == scores["reconstruction"]
    assert numbers["scores"]["uncertainty"] == scores["uncertainty"]
    assert f"{scores['reconstruction']['psnr']:.2f} dB" in numbers["methods"]
    assert numbers["methods"][:60] in page


def test_before_is_the_input_on_the_grid_of_the_output(folder: Path) -> None:
    shown = Shown(folder / "out.zarr")
    sections = read(folder / "in.zarr")
    nearest, straight = before(shown, open_input(shown, None), Box((3, 10, 20), (69, 11, 80)))
    np.testing.assert_allclose(straight, linear(sections, 5)[3:69, 10:11, 20:80], atol=1e-3)
    np.testing.assert_array_equal(nearest, sections[np.rint(np.arange(3, 69) / 5).astype(int), 10:11, 20:80])


@pytest.mark.parametrize("settings", [{"roi": "4:12,0:60,30:100", "factor": "7/2"}, {"damaged": "5,6"}])
def test_before_of_regions_and_damaged_sections(tmp_path: Path, settings: dict[str, str]) -> None:
    run(small_request(tmp_path, **settings))
    shown, sections = Shown(tmp_path / "out.zarr"), read(tmp_path / "in.zarr")
    box = Box((0, 5, 7), (shown.shape[0], 6, 60))
    nearest, straight = before(shown, open_input(shown, None), box)
    (first, y, x), _ = shown.job.region
    positions = [Fraction(int(p)) / Fraction(shown.job.factor) for p in np.arange(len(nearest)) + first]
    bad = set(shown.job.damaged)
    for row, position in enumerate(positions):
        below = max(s for s in range(15) if s <= position and s not in bad)
        above = min((s for s in range(15) if s >= position and s not in bad), default=below)
        t = float((position - below) / (above - below)) if above > below else 0.0
        line = [sections[s, 5 + y, 7 + x : 60 + x].astype(float) for s in (below, above)]
        np.testing.assert_allclose(straight[row, 0], (1 - t) * line[0] + t * line[1], atol=1e-3)
        np.testing.assert_array_equal(nearest[row, 0], line[t >= 0.5])


def test_run_that_is_not_complete_says_so(copy: Path, tmp_path: Path) -> None:
    ledger = Shown(copy).ledger
    ledger.record([Receipt(0, state=PENDING), Receipt(1, state=FAILED, tries=3), Receipt(2, state=SKIPPED)])
    output = Output(copy)
    output.seal(False)
    output.log("retry", block=1, tries=2, error="was shaky")
    output.log("failed", block=1, tries=3, error="<script>alert('no such chunk')</script>", traceback="...")
    page, numbers = made(copy, tmp_path)
    assert "This run is not complete: 50.0% of its blocks" in page and ", 1 failed and set aside" in page
    assert not numbers["complete"] and "not complete" in numbers["methods"]
    assert numbers["failed"] == {
        "count": 1,
        "first": [{"block": 1, "box": "0:64,0:60,64:100", "error": "<script>alert('no such chunk')</script>"}],
    }
    assert numbers["skipped"]["count"] == 1 and numbers["reliability"]["blocks"] == 1
    assert "&lt;script&gt;alert" in page and "<script" not in page
    assert numbers["point"][2] >= 64 and numbers["point"][0] >= 64  # in the one block that is made


def test_output_of_which_nothing_is_made(copy: Path, tmp_path: Path) -> None:
    Shown(copy).ledger.forget(range(4))
    Output(copy).seal(False)
    (copy / "events.jsonl").unlink()
    page, numbers = made(copy, tmp_path)
    assert "No block is made yet" in page and "Nothing is known yet" in page
    assert numbers["reliability"]["reliable_share"] is None and numbers["throughput"]["over_time"] is None


def test_input_that_has_moved(folder: Path, tmp_path: Path) -> None:
    run(small_request(tmp_path / "b"))
    shutil.move(tmp_path / "b" / "in.zarr", tmp_path / "moved.zarr")
    page, _ = made(tmp_path / "b" / "out.zarr", tmp_path)
    assert "The input is not shown" in page and "XY, Linear interpolation" not in pictures(page)
    page, _ = made(tmp_path / "b" / "out.zarr", tmp_path, "--with", tmp_path / "moved.zarr")
    assert "XY, Linear interpolation" in pictures(page)
    with pytest.raises(InputError, match="had \\(15, 60, 100\\)"):
        open_input(Shown(folder / "out.zarr"), str(folder / "truth.zarr"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.zarr"], "no output of emdvol reconstruct"),
        (["OUT", "--at", "71,0,0"], "outside the volume"),
        (["OUT", "--at", "1,2"], "expected a voxel Z,Y,X"),
        (["OUT", "--with", "none.zarr"], "does not exist"),
        (["OUT", "--truth", "IN"], "no fewer planes"),
        (["OUT", "--threshold", "0"], "0"),
        (["OUT", "--out", "report.pdf"], "ends in .html"),
    ],
)
def test_mistakes_are_one_line(folder: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    names = {"OUT": str(folder / "out.zarr"), "IN": str(folder / "in.zarr")}
    # Of an option given twice the last counts.
    result = report("--out", tmp_path / "r.html", *(names.get(a, a) for a in arguments))
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    assert says in " ".join(result.output.split()), result.output
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = report(folder / "out.zarr", "--out", tmp_path / "r.html")
    assert result.exit_code == 1 and "pip install 'emdiffuse_vol[view]'" in result.output


def test_point_and_planes_stay_inside(folder: Path) -> None:
    shown = Shown(folder / "out.zarr")
    z, y, x = choose_point(shown)
    assert (y, x) == (30, 50) and z % 5 in (2, 3) and abs(z - 35) <= 3
    with pytest.raises(GeometryError):
        choose_point(shown, (0, 60, 0))
    for axis in range(3):
        box = slab((70, 0, 99), (71, 60, 100), axis, 64)
        assert box in Box.of((71, 60, 100)) and box.shape[axis] == 1
        assert [n for i, n in enumerate(box.shape) if i != axis] == [n for i, n in enumerate((64, 60, 64)) if i != axis]
        assert Box((70, 0, 99), (71, 1, 100)) in box


def test_maps_of_a_million_blocks_are_small_and_lose_nothing_bad() -> None:
    rng = np.random.default_rng(0)
    state = np.full((40, 150, 300), DONE, np.uint8)
    p99 = rng.random(state.shape, np.float32)
    state[:, :60, :100] = SKIPPED
    state[:, 100:, 200:] = PENDING
    state[7, 120, 250] = FAILED
    state[3, 130, 290] = BRIDGED
    p99[3, 130, 290] = 5
    seen = project(state, p99, 0)
    assert max(seen.kind.shape) <= 128 and seen.step == (2, 3)
    assert set(np.unique(seen.kind)) == {MADE, UNMADE, OUTSIDE, BROKEN}
    assert (seen.kind == BROKEN).sum() == 1 and seen.kind[60, 83] == BROKEN
    assert seen.worst[65, 96] == 5 and seen.kind[65, 96] == MADE
    assert np.isnan(seen.worst[0, 0]) and seen.kind[0, 0] == OUTSIDE
    made_blocks = np.where(state == DONE, p99, -1)
    assert np.nanmax(seen.worst[:, :60]) == made_blocks[:, :, :180].max()


def test_throughput_adds_drivers_and_keeps_voxels() -> None:
    history = History(stretches=[Stretch(0, 10, 1000, "a"), Stretch(5, 25, 4000, "b"), Stretch(30, 40, 500, "a")])
    assert history.seconds == 35
    edges, rates = history.rates()
    assert (rates * np.diff(edges)).sum() == pytest.approx(5500)
    assert rates.max() == pytest.approx(300)
    assert rates[np.searchsorted(edges, 27)] == 0
    edges, rates = paced(np.array([3.0, 4.0, 9.0, 10.0]), 0, 800)
    assert (rates * np.diff(edges)).sum() == pytest.approx(800) and edges[0] == 0 and edges[-1] == 10


def test_times_of_blocks_are_when_their_files_were_written(folder: Path) -> None:
    times, history = made_at(Shown(folder / "out.zarr")), read_history(folder / "out.zarr")
    assert len(times) == 4 and history.first is not None and history.last is not None
    assert history.first - 2 <= times.min() <= times.max() <= history.last + 2


def test_torn_lines_of_the_log_are_passed_over(tmp_path: Path) -> None:
    stage = {"time": "2026-01-01T00:00:10Z", "event": "stage", "stage": "blocks", "seconds": 4.0, "voxels": 8}
    lines = [json.dumps(stage), '{"time": "2026-', "[1]", json.dumps({"event": "run"}), json.dumps(stage)[:-5], "\xff"]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    history = read_history(tmp_path)
    assert history.voxels == 8 and history.counts == {"stage": 1} and history.seconds == 4
    assert read_history(tmp_path / "nowhere").voxels == 0
