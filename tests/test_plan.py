"""What `emdvol plan` says of a run is so: counted block by block, clocked, or found on disk afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from volumes import run, small_request, smooth_volume, write_weights

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.cli.numbers import reading
from emdiffuse_vol.geometry.boxes import Box, ceil_div
from emdiffuse_vol.geometry.tiles import Tiling
from emdiffuse_vol.modes import isotropic_mode
from emdiffuse_vol.reconstruct import estimate
from emdiffuse_vol.reconstruct.estimate import Idle, ImaginedVolume, Speed, totals, traffic
from emdiffuse_vol.reconstruct.greys import GreyMap
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.plan import Plan, plan_blocks
from emdiffuse_vol.reconstruct.predict import Tile, predict_block
from emdiffuse_vol.reconstruct.run import prepare
from emdiffuse_vol.stores.chunked import ChunkedVolume
from emdiffuse_vol.stores.image import create_image, finish, open_array, write_units
from emdiffuse_vol.stores.small_arrays import open_small
from emdiffuse_vol.stores.volume import VolumeSpec, mirror_source

EXACT = Tiling((64, 64, 64), (4, 32, 32))
BLENDED = Tiling((1, 56, 56), (0, 4, 4), blend=True)
SHAPE = (31, 90, 170)


def planned(
    tiling: Tiling = EXACT,
    damaged: tuple[int, ...] = (),
    factor: str = "5",
    chunk: tuple[int, int, int] | None = (8, 64, 64),
    roi: Box | None = None,
    block: tuple[int, int, int] = (64, 64, 64),
) -> tuple[Plan, VolumeSpec]:
    mode = isotropic_mode(SHAPE, (50, 10, 10), Fraction(factor), damaged=damaged)
    plan = plan_blocks(mode, mode.region(roi), tiling, block, (64, 64, 64))
    return plan, VolumeSpec(SHAPE, "uint8", (50, 10, 10), chunk=chunk)


PLANS = {
    "exact": planned(),
    "blended": planned(BLENDED),
    "fraction": planned(factor="27/5"),
    "a region": planned(roi=Box((7, 10, 33), (19, 80, 140))),
    "blocks of several tiles": planned(block=(128, 64, 128)),
    "sections in files": planned(chunk=(1, 90, 170)),
    "chunks that blocks do not fit": planned(chunk=(3, 50, 100)),
    "no chunks": planned(chunk=None),
    "damaged sections": planned(damaged=(0, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20), chunk=(3, 64, 64)),
}
each_plan = pytest.mark.parametrize(("plan", "spec"), PLANS.values(), ids=PLANS)


def sources(plan: Plan) -> Iterator[np.ndarray]:
    """[z, y, x] of the input: what each block reads."""
    for i in range(len(plan)):
        source = mirror_source(plan[i].read, plan.mode.stack_shape)
        asked = np.zeros(SHAPE, bool)
        sections = plan.mode.axial.good[source.start[0] : source.stop[0]]
        asked[(sections, *source.slices()[1:])] = True
        yield asked


@each_plan
def test_voxels_asked_for_are_those_of_every_block(plan: Plan, spec: VolumeSpec) -> None:
    counted = totals(plan, spec.chunk)
    assert counted.asked == sum(asked.sum() for asked in sources(plan))
    assert counted.needed == np.logical_or.reduce(list(sources(plan))).sum()
    assert counted.asked > counted.needed


@each_plan
def test_chunks_fetched_are_those_of_every_block(plan: Plan, spec: VolumeSpec) -> None:
    counted, whole = totals(plan, spec.chunk), Box.of(spec.shape)
    if spec.chunk is None:
        assert counted.fetched is None and traffic(plan, spec)["read_amplification_chunks"] is None
        return
    grid = [range(ceil_div(n, c)) for n, c in zip(spec.shape, spec.chunk, strict=True)]
    starts = (tuple(i * c for i, c in zip(index, spec.chunk, strict=True)) for index in product(*grid))
    chunks = [Box(a, tuple(p + c for p, c in zip(a, spec.chunk, strict=True))) & whole for a in starts]
    fetched = sum(chunk.size for asked in sources(plan) for chunk in chunks if asked[chunk.slices()].any())
    assert counted.fetched == fetched
    assert traffic(plan, spec)["read_amplification_chunks"] == fetched / counted.needed


class Counting(Idle):
    """A predictor that counts the tiles it is given."""

    def __init__(self, tiling: Tiling) -> None:
        super().__init__(SimpleNamespace(tiling=tiling, batch=4, members=2, lost=0, evaluations=1))  # type: ignore[arg-type]
        self.count = 0

    def __call__(self, tiles: list[Tile]) -> tuple[Any, Any]:
        self.count += len(tiles)
        return super().__call__(tiles)


@each_plan
def test_tiles_are_those_the_network_is_given(plan: Plan, spec: VolumeSpec) -> None:
    predictor = Counting(plan.tiling)
    for i in range(len(plan)):
        block = plan[i]
        predict_block(plan, block, predictor, np.zeros(block.read.shape, np.uint8), GreyMap(0, 255), 1.0)
    assert traffic(plan, spec)["tiles"] == predictor.count


@each_plan
def test_overlap_is_that_of_every_block(plan: Plan, spec: VolumeSpec) -> None:
    tiles = sum(1 for index in range(len(plan)) for _ in plan.tiling.tiles_for(plan.write_box(index)))
    overlap = tiles * prod(plan.tiling.shape) / plan.region.size - 1
    assert traffic(plan, spec)["overlap_work"] == pytest.approx(overlap)


def test_files_bytes_and_ledger_are_those_on_disk(tmp_path: Path) -> None:
    request = small_request(tmp_path / "run")
    said = prepare(request).summary()
    codes = run(request)
    out = Path(request.out)
    shards = [f for f in out.glob("[0-9]*/c/**/*") if f.is_file()]
    assert said["files"] == len(shards)
    levels = [open_array(str(out), int(level.name)) for level in out.glob("[0-9]*")]
    assert said["written_bytes"] == sum(prod(level.shape) for level in levels)
    assert prod(levels[0].shape) == codes.size
    elements = [open_small(meta.parent) for meta in (out / "ledger").rglob("zarr.json")]
    assert said["ledger_bytes"] == sum(prod(a.shape) * a.dtype.numpy_dtype.itemsize for a in elements)


def test_voxels_asked_for_are_those_that_a_run_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request, read = small_request(tmp_path / "run", roi="2:13,5:60,0:90"), []
    true_read = ChunkedVolume.read

    def recorded(volume: ChunkedVolume, box: Box) -> Any:
        read.append(box.size)
        return true_read(volume, box)

    monkeypatch.setattr(ChunkedVolume, "read", recorded)
    said = prepare(request).summary()
    before_blocks = sum(read)
    read.clear()
    run(request)
    assert sum(read) - before_blocks == said["read_bytes"]


def test_a_run_tells_what_it_read_of_its_input(tmp_path: Path) -> None:
    request = small_request(tmp_path / "run", roi="2:13,5:60,0:90")
    said = prepare(request).summary()
    stored = sum(f.stat().st_size for f in Path(request.input, "0").rglob("*") if f.is_file() and f.name != "zarr.json")
    run(request)
    output = Output(Path(request.out))
    end = output.events()[-1]
    assert end["event"] == "end" and end["needed_bytes"] == said["input_bytes"]
    assert 0.5 * stored < end["read_bytes"]
    assert end["read_amplification"] == pytest.approx(end["read_bytes"] / end["needed_bytes"], abs=1e-3)
    assert f"{end['read_amplification']:.2f} times" in reading(end)


def test_counting_does_not_grow_with_the_number_of_blocks() -> None:
    spec = ImaginedVolume.of((28_000, 180_000, 220_000), (40, 4, 4)).spec
    mode = isotropic_mode(spec.shape, spec.voxel_size)
    plan = plan_blocks(mode, mode.region(None), EXACT)
    started = time.perf_counter()
    assert traffic(plan, spec)["tiles"] > 1e10 and len(plan) > 4e7
    assert time.perf_counter() - started < 10


def test_hours_are_seconds_times_blocks(tmp_path: Path) -> None:
    prepared = prepare(small_request(tmp_path / "run"))
    found = estimate.estimate(prepared, Speed(7.0, 2.0, "a device", 3, 1), devices=2, price=10)
    # 71 x 60 x 100 voxels in cells of 64 x 64 x 64: 2 x 1 x 2 tiles, each the only one of its block.
    assert found["seconds_per_block"] == 9
    assert found["device_hours"] * 3600 == pytest.approx(9 * len(prepared.plan)) and len(prepared.plan) == 4
    assert found["days"] * 2 * 24 == pytest.approx(found["device_hours"])
    assert found["cost"] == pytest.approx(10 * found["device_hours"])
    assert found["voxels_per_second"] == pytest.approx(71 * 60 * 100 / 36)


def test_the_clock_sees_the_network_and_all_of_its_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(small_request(tmp_path / "run"))

    class Sleeper(Idle):
        def __call__(self, tiles: list[Tile]) -> tuple[Any, Any]:
            time.sleep(0.05)
            return super().__call__(tiles)

    asked = []

    def opened(job: Any) -> Any:
        asked.append(job)
        return SimpleNamespace(predictor=Sleeper(prepared.predictor))

    monkeypatch.setattr(estimate, "context_for", opened)
    speed = estimate.calibrate(prepared)
    assert asked == [prepared.job]
    assert 0.05 <= speed.network < 0.5 and speed.runs == estimate.RUNS and 0 < speed.host < 5
    many = Idle(prepared.predictor)
    many.evaluations = 800
    speed = estimate.calibrate(replace(prepared, predictor=many))
    # One of its 800 evaluations was timed, those of one member and one step.
    assert asked[1] == replace(prepared.job, members=1, steps=1)
    assert 800 * 0.05 <= speed.network < 800 * 0.5


@pytest.mark.parametrize("tiling", [EXACT, BLENDED])
def test_the_tile_that_is_timed_is_one_that_is_computed(tiling: Tiling) -> None:
    for roi in (None, Box((3, 0, 0), (5, 90, 170)), Box((30, 5, 160), (31, 6, 170))):
        plan, _ = planned(tiling, roi=roi)
        one = estimate._middle(plan)
        assert len(one) == 1 and one.region in plan.region and not one.region.empty
        counted, needed = Counting(tiling), traffic(plan, planned()[1])["tiles"]
        predict_block(one, one[0], counted, np.zeros(one[0].read.shape, np.uint8), GreyMap(0, 255), 1.0)
        assert (counted.count > 0) == (needed > 0)


def test_a_slow_first_call_is_enough() -> None:
    calls = []
    seconds, runs = estimate._clock(lambda: calls.append(time.sleep(0.05)), seconds=0.01, runs=3)
    assert len(calls) == runs == 1 and seconds >= 0.05
    calls.clear()
    assert estimate._clock(lambda: calls.append(None), seconds=60, runs=3)[1] == 3 and len(calls) == 4


def emdvol(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def plan_json(*arguments: object) -> Any:
    status, output = emdvol("plan", *arguments, "--json")
    assert status == 0, output
    return json.loads(output)


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    """As `emdvol convert` stores it."""
    write_weights(tmp_path / "w.safetensors")
    path, greys = tmp_path / "in.zarr", smooth_volume((15, 60, 100))
    create_image(str(path), shape=greys.shape, dtype="uint8", voxel_size=(50, 10, 10), chunk=estimate.CHUNK)
    finish(write_units(open_array(str(path), 0, "w"), Box.of(greys.shape), greys))
    return path


def settings(stack: Path) -> list[object]:
    return ["--weights", stack.parent / "w.safetensors", "--tile", "64,64,64", "--shard", "64,64,64"]


def test_an_imagined_shape_costs_what_a_volume_of_that_shape_costs(stack: Path) -> None:
    imagined = plan_json("--shape", "15,60,100", "--voxel-size", "50,10,10", "--no-calibrate", *settings(stack))
    assert imagined == plan_json(stack, "--no-calibrate", *settings(stack))


def test_plan_and_dry_run_agree(stack: Path) -> None:
    status, output = emdvol(
        "reconstruct", stack, "--out", stack.parent / "o.zarr", *settings(stack), "--dry-run", "--json"
    )
    assert status == 0
    assert json.loads(output) == plan_json(stack, "--no-calibrate", *settings(stack))


def test_a_plan_tells_time_and_cost_and_writes_nothing(stack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stack.parent)
    before = sorted(stack.parent.rglob("*"))
    status, output = emdvol("plan", stack, *settings(stack), "--devices", 3, "--price", 2.5)
    assert status == 0
    for word in ("times the input", "files", "ledger", "thread", "float32", "device-hours", "3 devices", "at 2.5"):
        assert word in output, output
    assert sorted(stack.parent.rglob("*")) == before
    found = plan_json(stack, *settings(stack), "--devices", 3)["estimate"]
    assert found["device_hours"] > 0 and found["cost"] is None and found["devices"] == 3
    assert found["calibration"]["network"] > 0 and found["calibration"]["host"] > 0


def test_a_configuration_file_may_say_everything_and_flags_win(stack: Path) -> None:
    config = stack.parent / "plan.json"
    config.write_text(json.dumps({"input": str(stack), "members": 3, "weights": str(stack.parent / "w.safetensors")}))
    assert plan_json("--config", config, "--no-calibrate")["output"]["shape"] == [71, 60, 100]
    config.write_text(
        json.dumps({"voxel_size": [50, 10, 10], "damaged": "detect", "weights": str(stack.parent / "w.safetensors")})
    )
    made = plan_json("--config", config, "--shape", "3,60,100", "--members", 2, "--no-calibrate")
    assert made["output"]["shape"] == [11, 60, 100] and made["members"] == 2


def test_settings_of_a_cluster_are_no_hindrance(stack: Path) -> None:
    config = stack.parent / "plan.json"
    config.write_text(json.dumps({"cluster": {"partition": "gpu", "gres": "gpu:1", "jobs": 8}}))
    found = plan_json(stack, "--config", config, "--device", "cpu", *settings(stack))
    assert found["device"] == "cpu" and found["estimate"]["device_hours"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give INPUT, or --shape"),
        (["--shape", "9,90,90"], "give --voxel-size"),
        (["in.zarr", "--shape", "9,90,90"], "leave out INPUT or --shape"),
        (["--shape", "1,90,90", "--voxel-size", "40,8,8"], "at least 2"),
        (["--shape", "9,90,90", "--voxel-size", "8,8,8"], "already as fine"),
        (["--shape", "9,90", "--voxel-size", "40,8,8"], "three positive whole numbers"),
        (["nowhere.zarr"], "does not exist"),
        (["--shape", "9,90,90", "--voxel-size", "40,8,8", "--devices", "0"], "--devices"),
        (["--shape", "9,90,90", "--voxel-size", "40,8,8", "--price", "-1"], "--price"),
        (["--shape", "9,90,90", "--voxel-size", "40,8,8", "--block", "96,64,64"], "use --block"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], says: str) -> None:
    status, output = emdvol("plan", *arguments)
    lines = [line for line in output.splitlines() if line.startswith("Error")]
    assert status != 0 and len(lines) == 1 and says in lines[0], output
