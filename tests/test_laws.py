"""The laws of the engine, each on a whole run: real stores, real blocks, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from networks import random_section, random_slab
from volumes import file_hashes, read, run, small_request, smooth_volume, write_volume

from emdiffuse_vol.errors import BlockError, OutputError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.geometry.tiles import Tiling
from emdiffuse_vol.metrics.seams import face_differences, seam
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.modes import SectionWise, isotropic_mode
from emdiffuse_vol.reconstruct import worker
from emdiffuse_vol.reconstruct.device import Device
from emdiffuse_vol.reconstruct.greys import Codes, GreyMap
from emdiffuse_vol.reconstruct.ledger import Ledger
from emdiffuse_vol.reconstruct.plan import plan_blocks
from emdiffuse_vol.reconstruct.predict import Tile, predict_block
from emdiffuse_vol.reconstruct.predictors import PlanePredictor, Sampling, SectionPredictor, SlabPredictor
from emdiffuse_vol.reconstruct.run import prepare, reconstruct
from emdiffuse_vol.stores.volume import mirror_into, mirror_source

CPU = Device("cpu", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("laws")


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> dict[str, str]:
    """Hashes of an undisturbed run in small blocks."""
    reconstruct(small_request(folder, out=str(folder / "unbroken.zarr")))
    return file_hashes(folder / "unbroken.zarr")


# Law 1 is tests/test_geometry.py::test_write_boxes_partition_the_region; here, that a whole run obeys it.
def test_every_voxel_is_written_and_measured_sections_are_copied(folder: Path, unbroken: dict[str, str]) -> None:
    codes, sections = read(folder / "unbroken.zarr"), read(folder / "in.zarr")
    assert codes.shape == (2, 71, 60, 100)
    assert (codes[0, ::5] == sections).all()
    assert (codes[1, ::5] == 0).all()
    predicted = np.arange(71) % 5 != 0
    assert (codes[1, predicted] > 0).mean() > 0.98  # a hole would show


# Law 2
@pytest.mark.parametrize(
    "settings",
    [
        {"block": (64, 64, 128)},
        {"block": (128, 64, 64)},
        {"tile": (64, 64, 128)},
        {"workers": 2},
        {"executor": "dask", "workers": 2},
    ],
    ids=["larger blocks", "other blocks", "tiles larger than blocks", "two workers", "dask"],
)
def test_the_output_is_the_same_bytes_however_the_work_is_divided(folder: Path, unbroken, settings) -> None:
    out = folder / f"{'-'.join(f'{key}{value}' for key, value in settings.items())}.zarr"
    reconstruct(small_request(folder, out=str(out), **settings))
    assert file_hashes(out) == unbroken


def test_another_seed_gives_another_spread_and_the_same_mean(folder: Path, unbroken: dict[str, str]) -> None:
    first = read(folder / "unbroken.zarr")
    other = run(small_request(folder, out=str(folder / "seed.zarr"), seed=1))
    assert (other[0] == first[0]).all()
    assert (other[1] != first[1]).mean() > 0.3


def test_a_region_is_the_same_part_of_the_whole(folder: Path, unbroken: dict[str, str]) -> None:
    whole = read(folder / "unbroken.zarr")
    part = run(small_request(folder, out=str(folder / "roi.zarr"), roi="3:12,11:55,40:100"))
    assert (part == whole[:, 15:56, 11:55, 40:100]).all()


# Laws 2, 7 and 8
@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_an_unbroken_one(folder: Path) -> None:
    slow = {"members": 64, "workers": 1}  # so that blocks are recorded one by one
    request = small_request(folder, out=str(folder / "killed.zarr"), **slow)
    reconstruct(replace(request, out=str(folder / "not-killed.zarr")))
    command = [sys.executable, "-m", "emdiffuse_vol", "reconstruct", request.input, "--out", request.out]
    command += ["--weights", request.weights, "--shard", "64,64,64", "--tile", "64,64,64"]
    command += ["--members", "64", "--workers", "1"]
    kills = 0
    while (before := blocks_done(request.out)) < 3:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while blocks_done(request.out) == before and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        assert before < blocks_done(request.out) < 4, "the run was to be killed in its middle"
        done = Ledger(Path(request.out), "", (2, 1, 2)).state.reshape(2, 1, 2) == 1
        for place in np.argwhere(done):  # done means durable
            z, y, x = place * 64
            assert read(request.out)[0, z : z + 64, y : y + 64, x : x + 64].all()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert file_hashes(request.out) == file_hashes(folder / "not-killed.zarr")
    starts = [json.loads(line) for line in (Path(request.out) / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in starts].count("run") == kills + 1 >= 3


@pytest.mark.slow
def test_killed_dask_workers_cost_their_blocks_only(folder: Path, unbroken: dict[str, str]) -> None:
    request = small_request(folder, out=str(folder / "workers.zarr"), executor="dask", workers=1)
    killed = []

    def kill_workers(progress) -> None:
        if progress.stage == "blocks" and progress.done == 1 and not killed:
            for process in psutil.Process().children(recursive=True):
                if "spawn" in " ".join(process.cmdline()) and "resource_tracker" not in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)

    reconstruct(request, kill_workers)
    assert killed and file_hashes(request.out) == unbroken


def blocks_done(out: str) -> int:
    try:
        return Ledger(Path(out), "", (2, 1, 2)).finished
    except OutputError:  # not created yet
        return 0


def test_a_finished_run_does_nothing_more(folder: Path, unbroken: dict[str, str]) -> None:
    before = {f: f.stat().st_mtime_ns for f in (folder / "unbroken.zarr").rglob("*") if f.is_file()}
    reconstruct(small_request(folder, out=str(folder / "unbroken.zarr")))
    assert before == {f: f.stat().st_mtime_ns for f in (folder / "unbroken.zarr").rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, "seed is 0 there, 5 here"),
        ({"members": 3}, "members is 4 there, 3 here"),
        ({"factor": "4"}, "factor is 5 there, 4 here"),
        ({"block": (128, 64, 64)}, "block is"),
        ({"mode": "vEMDiffuse-i"}, "mode is vEMDiffuse-a there, vEMDiffuse-i here"),
    ],
)
def test_an_output_of_other_settings_is_refused_with_the_difference(folder: Path, unbroken, change, named) -> None:
    before = file_hashes(folder / "unbroken.zarr")
    with pytest.raises(OutputError, match=named):
        reconstruct(small_request(folder, out=str(folder / "unbroken.zarr"), **change))
    assert file_hashes(folder / "unbroken.zarr") == before


def test_an_output_of_another_input_is_refused_even_under_the_same_name(folder: Path, tmp_path: Path) -> None:
    request = small_request(tmp_path)
    reconstruct(request)
    import shutil

    shutil.rmtree(request.input)
    write_volume(Path(request.input), smooth_volume((15, 60, 100), seed=1), (50, 10, 10))
    with pytest.raises(OutputError, match=r"belongs to another run: .*input_identity"):
        reconstruct(request)
    reconstruct(replace(request, overwrite=True))
    assert (read(request.out)[0, ::5] == read(request.input)).all()


def test_foreign_folders_are_never_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.zarr").mkdir()
    (tmp_path / "precious.zarr" / "data").write_text("years of work")
    with pytest.raises(OutputError, match="is no output of emdvol"):
        reconstruct(small_request(folder, out=str(tmp_path / "precious.zarr"), overwrite=True))
    assert (tmp_path / "precious.zarr" / "data").read_text() == "years of work"


@pytest.mark.parametrize("kind", ["slab", "sections", "published"])
def test_a_tile_is_the_same_bits_with_any_number_of_threads(published: UNet, kind: str) -> None:
    sections, sampling = smooth_volume((3, 56, 56)).astype(np.float32), Sampling(2, 0, "ddim", 2, None)
    between, restored = isotropic_mode(sections.shape, (50, 10, 10)), SectionWise(sections.shape, 1, 1)
    mode, predictor = {
        "slab": lambda: (between, SlabPredictor(random_slab(16, 24), between, sampling, CPU)),
        "sections": lambda: (restored, SectionPredictor(random_section(), restored, sampling, CPU)),
        "published": lambda: (
            between,
            PlanePredictor(published, between, replace(sampling, tile=(1, 56, 56)), CPU),
        ),
    }[kind]()
    threads, made = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):  # 3: shares of no whole number of vectors
            torch.set_num_threads(number)
            made.append(predict_all(mode, predictor, sections))
    finally:
        torch.set_num_threads(threads)
    assert (made[0] == made[1]).all() and (made[0] == made[2]).all()


# Law 3
def test_tiled_output_of_a_bounded_network_equals_untiled_output() -> None:
    sections = smooth_volume((6, 100, 90)).astype(np.float32)
    mode = isotropic_mode(sections.shape, (50, 10, 10))
    whole = SlabPredictor(random_slab(), mode, Sampling(3, 0, "ancestral", 1, (26, 100, 92)), CPU)
    tiled = SlabPredictor(random_slab(), mode, Sampling(3, 0, "ancestral", 1, (16, 48, 48)), CPU)
    outputs = [predict_all(mode, predictor, sections) for predictor in (whole, tiled)]
    assert len(list(tiled.tiling.tiles_for(Box.of(mode.output_shape)))) == 12
    assert np.abs(outputs[0] - outputs[1]).max() < 2e-3  # greys of 0..255: float rounding


def predict_all(mode, predictor, sections: np.ndarray) -> np.ndarray:
    """-> mean and uncertainty [2, z, y, x] as float32, all in one block."""
    shard = tuple(-(-n // 64) * 64 for n in mode.output_shape)
    plan = plan_blocks(mode, mode.region(None), predictor.tiling, None, shard)
    block = plan[0]
    greys = mirror_into(
        sections[mirror_source(block.read, sections.shape).slices()],
        mirror_source(block.read, sections.shape),
        block.read,
        sections.shape,
    )
    return predict_block(plan, block, predictor, greys, GreyMap(0, 255), 1.0)


class Grey:
    """A stand-in for a network with global context whose tiles disagree as much as can be: each is its own offset, and
    a trace of a ramp, as a constant tile would be taken for a failure."""

    batch, members, lost, evaluations = 3, 2, 1, 1
    tiling = Tiling((1, 48, 48), (0, 8, 8), blend=True)

    def __call__(self, tiles: list[Tile]) -> tuple[torch.Tensor, torch.Tensor]:
        ramp = torch.linspace(0, 1e-4, 64)
        values = torch.stack([hash(t.box.start[1:]) % 97 / 97 + ramp + torch.zeros(2, *t.box.shape) for t in tiles])
        return values.mean(1), values

    def flops(self) -> int:
        return 0

    def memory(self) -> int:
        return 0


def test_blended_tiles_leave_no_step_at_tile_borders() -> None:
    sections = smooth_volume((3, 200, 200)).astype(np.float32)
    mode = isotropic_mode(sections.shape, (20, 10, 10))
    mean = predict_all(mode, Grey(), sections)[0][1]
    # Tiles differ by up to 127 greys; a ramp over 16 pixels may change by 1/16 of that from pixel to pixel.
    assert np.abs(np.diff(mean, axis=0)).max() < 127 / 16 * 1.01
    assert np.abs(np.diff(mean, axis=1)).max() < 127 / 16 * 1.01
    assert np.ptp(mean) > 20


@pytest.fixture(scope="module")
def published() -> UNet:
    torch.manual_seed(0)
    return UNet(in_channels=3, slices=True).eval().requires_grad_(False)


def test_published_network_runs_through_the_engine_and_its_spread_has_no_dip_in_overlaps(published: UNet) -> None:
    sections = smooth_volume((2, 84, 84)).astype(np.float32)
    mode = isotropic_mode(sections.shape, (20, 10, 10))
    predictor = PlanePredictor(published, mode, Sampling(4, 0, "dpm-solver-2m", 2, (1, 28, 28)), CPU)
    mean, spread = predict_all(mode, predictor, sections)[:, 1]
    border = np.zeros(84, bool)
    for edge in (28, 56):
        border[edge - 2 : edge + 2] = True
    overlap, core = spread[np.ix_(border, border)], spread[np.ix_(~border, ~border)]
    assert 0.85 < overlap.mean() / core.mean() < 1.15
    assert np.isfinite(mean).all() and mean.std() > 0


def test_published_network_gives_the_same_voxels_in_any_block(published: UNet) -> None:
    sections = smooth_volume((2, 40, 100)).astype(np.float32)
    mode = isotropic_mode(sections.shape, (20, 10, 10))
    predictor = PlanePredictor(published, mode, Sampling(2, 0, "ddim", 2, (1, 28, 28)), CPU)
    whole = predict_all(mode, predictor, sections)
    plan = plan_blocks(mode, mode.region(None), predictor.tiling, None, (64, 64, 64))
    for index in (0, 1):
        block = plan[index]
        source = mirror_source(block.read, sections.shape)
        greys = mirror_into(sections[source.slices()], source, block.read, sections.shape)
        codes = predict_block(plan, block, predictor, greys, GreyMap(0, 255), 1.0)
        assert (codes == whole[(slice(None), *block.write.slices())]).all()


# Law 5
def test_the_spread_of_a_run_has_no_grid_at_tile_or_block_planes(folder: Path, unbroken: dict[str, str]) -> None:
    codes = read(folder / "unbroken.zarr").astype(np.float32)
    for channel in (0, 1):
        values = codes[channel, np.arange(71) % 5 == 2]
        assert abs(seam(face_differences(values, axis=2), [63]).deviation) < 4


def test_spread_of_stored_codes_is_that_of_the_members() -> None:
    sections = smooth_volume((4, 40, 40)).astype(np.float32)
    mode = isotropic_mode(sections.shape, (50, 10, 10))
    predictor = SlabPredictor(random_slab(), mode, Sampling(6, 3, "ancestral", 1, None), CPU)
    codes = predict_all(mode, predictor, sections)
    box = predictor.tiling.input_box((0, 0, 0))
    source = mirror_source(mode.read_box(box), sections.shape)
    greys = mirror_into(sections[source.slices()], source, mode.read_box(box), sections.shape)
    below, t = mode.axial.locate(np.arange(box.start[0], box.stop[0]))
    tile = Tile(box, GreyMap(0, 255).normalise(greys), below - mode.read_box(box).start[0], t)
    mean, members = predictor([tile])
    expected = (members - mean[:, None]).square().mean(dim=1).sqrt()[0].numpy() * 127.5
    inner = Box.of(mode.output_shape).slices()
    predicted = np.arange(16) % 5 != 0
    assert np.allclose(codes[1][predicted], expected[inner][predicted], rtol=1e-4)


def test_uncertainty_code_is_an_eighth_of_a_grey_and_saturates() -> None:
    codes = Codes("uint8")
    assert codes.step == 1 / 8 and codes.largest == 31.875
    assert codes.uncertainty(np.array([0, 0.125, 1, 31.875, 99], np.float32)).tolist() == [0, 1, 8, 255, 255]
    assert codes.mean(np.array([-3, 0.4, 254.6, 300], np.float32)).tolist() == [0, 0, 255, 255]


# Law 9 is measured by benchmarks/memory.py; here, that the plan of a huge volume is not a list.
def test_ledger_of_a_run_is_one_byte_a_block(folder: Path, unbroken: dict[str, str]) -> None:
    ledger = Ledger(folder / "unbroken.zarr", "", (2, 1, 2))
    assert ledger.state.dtype == np.uint8 and ledger.state.nbytes == 4 and ledger.finished == 4
    p99 = read_ledger(folder / "unbroken.zarr", "p99")
    assert (p99 > 0).all() and p99.shape == (2, 1, 2)


def read_ledger(out: Path, field: str) -> np.ndarray:
    from emdiffuse_vol.stores.small_arrays import open_small

    return open_small(out / "ledger" / field).read().result()


def test_a_network_that_gives_nan_fails_the_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self, tiles):
        core = self.tiling.core
        return torch.full((1, *core), np.nan), torch.full((1, self.members, *core), np.nan)

    monkeypatch.setattr(SlabPredictor, "__call__", broken)
    worker._contexts.clear()
    request = small_request(folder, out=str(folder / "nan.zarr"))
    with pytest.raises(BlockError, match="NaN"):
        reconstruct(request)
    assert blocks_done(request.out) == 0


def test_pyramid_levels_are_means_of_the_level_above(tmp_path: Path) -> None:
    request = small_request(tmp_path)
    write_volume(tmp_path / "wide.zarr", smooth_volume((3, 20, 600)), (20, 10, 10))
    reconstruct(replace(request, input=str(tmp_path / "wide.zarr"), tile=None, shard=None))
    fine, coarse = read(request.out).astype(float), read(request.out, 1).astype(float)
    assert coarse.shape == (2, 3, 10, 300)
    pairs = fine[:, :4].reshape(2, 2, 2, 10, 2, 300, 2).mean(axis=(2, 4, 6))
    last = fine[:, 4:].reshape(2, 1, 10, 2, 300, 2).mean(axis=(3, 5))  # an odd plane at the end stands alone
    assert np.abs(coarse - np.concatenate([pairs, last], axis=1)).max() <= 0.5


def test_output_says_what_made_it(folder: Path, unbroken: dict[str, str]) -> None:
    attributes = json.loads((folder / "unbroken.zarr" / "zarr.json").read_text())["attributes"]["emdvol"]
    prepared = prepare(small_request(folder, out=str(folder / "unbroken.zarr")))
    assert attributes["sealed"] is True
    assert attributes["fingerprint"] == prepared.job.fingerprint()
    assert attributes["provenance"]["weights"]["sha256"] == prepared.weights.sha256
    assert {"emdiffuse_vol", "torch", "tensorstore"} <= attributes["provenance"]["software"].keys()
    assert os.path.basename(attributes["provenance"]["input"]) == "in.zarr"


def test_output_is_valid_for_readers_we_did_not_write(folder: Path, unbroken: dict[str, str]) -> None:
    import ome_zarr_models
    import zarr

    path = folder / "unbroken.zarr"
    assert type(ome_zarr_models.open_ome_zarr(str(path), version="0.5")).__name__ == "Image"
    group = zarr.open_group(path, mode="r")
    assert (np.asarray(group["0"]) == read(path)).all()
    assert group["0"].metadata.dimension_names == ("c", "z", "y", "x")
    ome = group.attrs["ome"]
    assert [channel["label"] for channel in ome["omero"]["channels"]] == ["mean", "uncertainty"]
    assert all({"color", "window", "active"} <= channel.keys() for channel in ome["omero"]["channels"])
    scale, translation = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [1, 10, 10, 10] and translation["translation"] == [0, 0, 0, 0]
