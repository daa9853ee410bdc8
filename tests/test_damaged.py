"""Damaged sections: where planes lie between the good ones, that the damaged ones are never used, and what is found."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import tifffile
import torch
import xarray as xr
from blocks import compute
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.io import imread
from volumes import file_hashes, read, run, small_request, smooth_volume, write_volume

import emdiffuse_vol
from emdiffuse_vol.errors import ConfigError, GeometryError
from emdiffuse_vol.geometry.axial import AxialGrid, good_sections, parse_sections
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.metrics.image import psnr
from emdiffuse_vol.metrics.spread import coverage
from emdiffuse_vol.models.checkpoints import load_weights
from emdiffuse_vol.models.slab import position_features
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.modes import isotropic_mode
from emdiffuse_vol.reconstruct.device import Device
from emdiffuse_vol.reconstruct.job import Job, Request
from emdiffuse_vol.reconstruct.predict import UNKNOWN, Tile
from emdiffuse_vol.reconstruct.predictors import PlanePredictor, Sampling, span_scales
from emdiffuse_vol.reconstruct.run import prepare
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.sections import without_sections
from emdiffuse_vol.stores.survey import LONGEST, damaged_sections

factors = st.fractions(min_value=Fraction(11, 10), max_value=12, max_denominator=50)


@st.composite
def damaged_grids(draw: st.DrawFn) -> AxialGrid:
    sections = draw(st.integers(2, 30))
    good = draw(st.sets(st.integers(0, sections - 1), min_size=2))
    return AxialGrid(sections, draw(factors), tuple(sorted(set(range(sections)) - good)))


def position(grid: AxialGrid, number: int) -> int:
    """Of a good section, mirrored at the first and the last as often as needed: one step after the other."""
    good, place, step, k = grid.good.tolist(), int(grid.good[0]), 1 if number > 0 else -1, 0
    for _ in range(abs(number)):
        period = 2 * (len(good) - 1)
        here, there = (min(n % period, period - n % period) for n in (k, k + step))
        place += step * abs(good[there] - good[here])
        k += step
    return place


# Geometry
@settings(deadline=None, max_examples=200)
@given(damaged_grids(), st.integers(-100, 400))
def test_planes_lie_between_the_good_sections_around_them(grid: AxialGrid, plane: int) -> None:
    (index,), (t,) = grid.locate(np.array([plane]))
    (span,) = grid.span(np.array([plane]))
    below, above = position(grid, int(index)), position(grid, int(index) + 1)
    exact = (Fraction(plane) / grid.factor - below) / (above - below)
    assert 0 <= exact < 1 and span == above - below
    assert t == np.float32(float(exact))
    assert grid.copied(np.array([plane]))[0] == (exact == 0)


@settings(deadline=None, max_examples=100)
@given(damaged_grids())
def test_measured_and_bridged_planes_are_where_sections_are_good_and_damaged(grid: AxialGrid) -> None:
    planes = np.arange(grid.planes)
    place = [Fraction(int(p)) / grid.factor for p in planes]
    good = set(grid.good.tolist())
    assert grid.measured(planes).tolist() == [p in good for p in place]
    # Bridged: a section on either side is damaged, and the plane is no good section itself.
    near = [{p.__floor__(), p.__ceil__()} for p in place]
    assert grid.bridged(planes).tolist() == [p not in good and not n <= good for p, n in zip(place, near, strict=True)]
    assert grid.beyond(planes).tolist() == [p < min(good) or p > max(good) for p in place]
    assert grid.planes == AxialGrid(grid.sections, grid.factor).planes


def test_a_grid_of_many_sections_is_quick() -> None:
    grid = AxialGrid(30_000, Fraction(450, 43), tuple(range(100, 30_000, 100)))
    index, t = grid.locate(np.arange(grid.planes - 512, grid.planes))
    assert index[-1] in (29_999 - 299, 29_998 - 299) and (t < 1).all()
    assert grid.spans == (1, 2)


def test_lists_of_sections() -> None:
    assert parse_sections("17,42-44", 100) == (17, 42, 43, 44)
    assert parse_sections(" 3, 1-2,2 ", 4) == (1, 2, 3)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "5-3", "1-2-3", "-1", "1.5"])
def test_lists_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="give for example 17,42-44"):
        parse_sections(text, 100)


def test_sections_that_are_not_there_are_refused_whatever_their_number() -> None:
    for text in ("100", "3-100", "0-99999999999999999999"):
        with pytest.raises(GeometryError, match="has 0 to 99"):
            parse_sections(text, 100)


def test_at_least_two_good_sections_are_needed() -> None:
    assert good_sections(4, (1, 2)).tolist() == [0, 3]
    with pytest.raises(GeometryError, match="3 of 4 sections are damaged"):
        AxialGrid(4, Fraction(5), (0, 1, 2))


# Volumes
@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(0, 11), min_size=2), st.data())
def test_a_volume_without_sections_holds_the_others(tmp_path_factory, good: set[int], data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "twelve.zarr"
    greys = np.random.default_rng(0).integers(0, 255, (12, 20, 30), dtype=np.uint8)
    if not path.exists():
        write_volume(path, greys, (40, 8, 8))
    volume = without_sections(open_volume(path), tuple(sorted(set(range(12)) - good)))
    left = greys[sorted(good)]
    assert volume.spec.shape == left.shape
    start = tuple(data.draw(st.integers(0, n - 1)) for n in left.shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, left.shape, strict=True))
    box = Box(start, stop)
    assert (volume.read(box) == left[box.slices()]).all()


def test_a_volume_without_damage_is_itself(tmp_path: Path) -> None:
    volume = open_volume(write_volume(tmp_path / "v.zarr", smooth_volume((3, 8, 8)), (40, 8, 8)))
    assert without_sections(volume, ()) is volume
    assert without_sections(volume, (1,)).url == volume.url


# Networks
def test_one_gap_for_all_planes_and_equal_gaps_for_each_are_the_same_bits() -> None:
    t = torch.rand(77)
    for gap in (1.5, 4.3, 10.465116, 14.0):
        each = torch.full((77,), gap)
        assert torch.equal(position_features(t, gap), position_features(t, each))


def test_gaps_are_those_of_the_span_up_to_the_widest_that_weights_know() -> None:
    mode = replace(isotropic_mode((6, 9, 9), (50, 10, 10), damaged=(2,)), widest=8.0)
    assert mode.gaps(Box((0, 0, 0), (26, 1, 1))).tolist() == [5] * 5 + [8] * 10 + [5] * 11
    assert mode.read_box(Box((6, 0, 0), (15, 1, 1))) == Box((0, 0, 0), (4, 1, 1))
    assert mode.stack_shape == (5, 9, 9)


def test_scales_beyond_what_weights_know_grow_as_the_root_of_the_distance() -> None:
    weights = load_weights()
    mode = replace(isotropic_mode((9, 9, 9), (100, 10, 10), damaged=(2, 5, 6)), widest=14.0)
    scales = span_scales(weights, mode, 4)
    assert set(scales) == {1, 2, 3} and scales[1] == weights.calibrated_scale(10, 4)
    assert scales[2] == pytest.approx(weights.calibrated_scale(14, 4) * (20 / 14) ** 0.5)


def test_the_published_network_is_asked_for_the_nearest_plane_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = isotropic_mode((4, 28, 28), (40, 10, 10), damaged=(1,))  # factor 4: planes 0, 1 and 2 are known
    net = UNet(in_channels=3, slices=True).eval().requires_grad_(False)
    predictor = PlanePredictor(net, mode, Sampling(2, 0, "ddim", 1, (1, 28, 28)), Device("cpu", "float32"))
    asked = []
    monkeypatch.setattr(UNet, "forward", lambda self, x, gamma, index: asked.append(int(index[0])) or x[:, :1])
    below, t = mode.axial.locate(np.arange(1, 8))
    for k in range(7):
        box = predictor.tiling.input_box((k + 1, 0, 0))
        sections = np.zeros((4, *predictor.tiling.shape[1:]), np.float32)
        predictor([Tile(box, sections, np.array([1]), t[k : k + 1])])
    assert below.tolist() == [0] * 7
    assert asked[::2] == [0, 0, 1, 1, 1, 2, 2]


# Runs
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


DAMAGED = "4,9-10"


@pytest.fixture(scope="module")
def bridged(folder: Path) -> np.ndarray:
    return compute(small_request(folder, damaged=DAMAGED))


def test_good_sections_are_copied_and_the_output_is_as_large_as_ever(folder: Path, bridged: np.ndarray) -> None:
    greys = read(folder / "in.zarr")
    good = np.delete(np.arange(15), [4, 9, 10])
    assert bridged.shape == (2, 71, 60, 100)
    assert (bridged[0, good * 5] == greys[good]).all() and (bridged[1, good * 5] == 0).all()
    assert (bridged[1, [20, 45, 50]] > 0).mean() > 0.98


def test_what_is_in_a_damaged_section_has_no_influence(folder: Path, bridged: np.ndarray, tmp_path: Path) -> None:
    greys = read(folder / "in.zarr").copy()
    greys[[4, 9]], greys[10] = 0, 255
    request = small_request(tmp_path, damaged=DAMAGED)
    write_volume(tmp_path / "black.zarr", greys, (50, 10, 10))
    assert (compute(replace(request, input=str(tmp_path / "black.zarr"))) == bridged).all()


def test_planes_far_from_damage_are_what_they_were(folder: Path, bridged: np.ndarray) -> None:
    part = "5:13,0:60,0:64"  # planes 25 to 60
    whole = compute(small_request(folder, roi=part), greys=(50.0, 210.0))
    late = compute(small_request(folder, roi=part, damaged="12"), greys=(50.0, 210.0))
    # Section 12 is seen by the planes of the gap below section 11 too, and those by 4 more in the network.
    assert (late[:, : 50 - 4 - 25] == whole[:, : 50 - 4 - 25]).all()
    assert (late[:, 56 - 25 : 60 - 25] != whole[:, 56 - 25 : 60 - 25]).any(axis=(0, 2, 3)).all()


def test_each_span_has_its_own_scale(folder: Path, bridged: np.ndarray) -> None:
    request = small_request(folder, damaged=DAMAGED)
    job = prepare(request).job
    assert job.scale == 1 and job.bridged_scale == {"2": 1, "3": 1}  # weights of tests are not calibrated
    wide = compute(request, bridged_scale={"2": 2.0, "3": 3.0})
    expected = np.ones(71)
    expected[16:25], expected[41:55] = 2, 3
    assert (wide[0] == bridged[0]).all()
    unsaturated = wide[1] < 255
    difference = wide[1] - bridged[1] * expected[:, None, None]
    assert unsaturated.mean() > 0.8 and np.abs(difference[unsaturated]).max() <= 1.5  # codes are rounded


def test_blocks_and_tiles_do_not_matter(folder: Path, bridged: np.ndarray) -> None:
    codes = compute(small_request(folder, damaged=DAMAGED, block=(128, 64, 128), tile=(64, 64, 128)))
    assert (codes == bridged).all()


def test_a_region_is_the_same_part_of_the_whole(folder: Path, bridged: np.ndarray) -> None:
    part = compute(small_request(folder, damaged=DAMAGED, roi="3:12,11:55,40:100"))
    assert (part == bridged[:, 15:56, 11:55, 40:100]).all()


def test_blocks_say_whether_they_are_bridged(folder: Path) -> None:
    plan = prepare(small_request(folder, damaged="14")).plan
    assert [plan.bridged(plan[index]) for index in range(4)] == [False, False, True, True]
    assert not any(plan.bridged(plan[index]) for plan in [prepare(small_request(folder)).plan] for index in range(4))


def test_beyond_the_last_good_section_nothing_is_known(folder: Path) -> None:
    prepared = prepare(small_request(folder, damaged="0,14"))
    codes = compute(prepared.request)
    greys, (low, high) = read(folder / "in.zarr"), prepared.job.greys
    assert (codes[0, 5] == greys[1]).all() and (codes[0, 65] == greys[13]).all()
    assert (codes[0, 0] == greys[2]).all() and (codes[0, 70] == greys[12]).all()  # mirror images
    least = min(255, round(UNKNOWN * (high - low) / 2 * 8))
    assert (codes[1, :5] >= least).all() and (codes[1, 66:] >= least).all()
    assert (codes[1, 6:10] < least).mean() > 0.9


def test_a_run_with_damaged_sections(folder: Path, bridged: np.ndarray) -> None:
    codes = run(small_request(folder, damaged=DAMAGED, out=str(folder / "local.zarr")))
    assert (codes == bridged).all()
    other = small_request(folder, damaged=DAMAGED, out=str(folder / "other.zarr"), block=(128, 64, 128), workers=2)
    run(other)
    assert file_hashes(other.out) == file_hashes(folder / "local.zarr")


def test_the_xarray_interface_gives_the_same(folder: Path, bridged: np.ndarray) -> None:
    request = small_request(folder)
    array = xr.DataArray(da.from_array(read(request.input), chunks=(4, 32, 32)), dims=("z", "y", "x"))
    settings = {"weights": request.weights, "shard": request.shard, "tile": request.tile, "damaged": DAMAGED}
    result = emdiffuse_vol.isotropic(array, voxel_size=(50, 10, 10), **settings).compute(scheduler="synchronous")
    assert (result["mean"].values == bridged[0]).all()
    assert np.array_equal(result["uncertainty"].values, bridged[1] * np.float32(1 / 8))


def test_a_job_survives_json_and_other_damage_is_another_job(folder: Path) -> None:
    job = prepare(small_request(folder, damaged=DAMAGED)).job
    again = Job.of(json.loads(json.dumps(job.stored())))
    assert again == job and again.plan == job.plan and again.damaged == (4, 9, 10)
    assert job.fingerprint() != prepare(small_request(folder, damaged="4,9")).job.fingerprint()
    assert job.fingerprint() == prepare(small_request(folder, damaged="10,9,4")).job.fingerprint()


@pytest.mark.parametrize(
    ("damaged", "error"),
    [("4,x", ConfigError), ("15", GeometryError), ("0-13", GeometryError), ("0-14", GeometryError)],
)
def test_mistakes_are_one_line(folder: Path, damaged: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        prepare(small_request(folder, damaged=damaged))
    assert "\n" not in str(caught.value)


# Finding them
def found(greys: np.ndarray, path: Path) -> tuple[int, ...]:
    return damaged_sections(open_volume(write_volume(path / "v.zarr", greys, (40, 8, 8))))


def test_constant_and_dark_and_bright_sections_are_found(tmp_path: Path) -> None:
    greys = smooth_volume((60, 150, 150))
    assert found(greys, tmp_path / "sound") == ()
    greys[[0, 20, 21]] = 0
    greys[33] = 77
    greys[41] = greys[41] // 4
    greys[50] = np.minimum(greys[50].astype(int) + 90, 255)
    assert found(greys, tmp_path / "damaged") == (0, 20, 21, 33, 41, 50)


def test_a_request_may_ask_to_look_for_them(folder: Path, tmp_path: Path) -> None:
    greys = read(folder / "in.zarr").copy()
    greys[[4, 9]], greys[10] = 0, 255
    request = small_request(tmp_path)
    write_volume(tmp_path / "black.zarr", greys, (50, 10, 10))
    job = prepare(replace(request, input=str(tmp_path / "black.zarr"), damaged="detect")).job
    assert job.damaged == (4, 9, 10)


def test_a_step_of_greys_and_the_end_of_the_specimen_are_no_damage(tmp_path: Path) -> None:
    greys = smooth_volume((60, 150, 150)) // 2
    greys[25:] += 100
    assert found(greys, tmp_path / "step") == ()
    greys[: LONGEST + 1] = 0
    assert found(greys, tmp_path / "padded") == ()


def test_small_specimens_between_the_patches_are_no_damage(tmp_path: Path) -> None:
    greys = smooth_volume((40, 600, 600))
    inside = np.zeros(greys.shape, bool)
    inside[:, 250:350, 250:350] = True
    inside[10:14] = False
    inside[10:14, 180:240, 180:240] = True  # for four sections, where the patches of the first look are not
    assert found(np.where(inside, greys, 0), tmp_path) == ()


def test_sections_without_a_number_are_damaged(tmp_path: Path) -> None:
    greys = smooth_volume((20, 80, 80), dtype="float32")
    greys[7] = np.nan
    assert found(greys, tmp_path) == (7,)


@pytest.mark.parametrize("name", ["fib25_val", "vnc_sstem_NC", "celegans_tiff_series"])
def test_real_stacks_give_no_false_alarm_and_blackened_sections_are_found(data: Path, tmp_path: Path, name) -> None:
    greys = real_stack(data, name)
    assert found(greys, tmp_path / "as it is") == ()
    greys[5], greys[9:11], greys[14] = 0, 255, greys[14] // 5
    assert found(greys, tmp_path / "damaged") == (5, 9, 10, 14)


def real_stack(data: Path, name: str) -> np.ndarray:
    if name == "fib25_val":
        return np.stack([imread(f) for f in sorted((data / name / "grayscale_maps").glob("*.png"))[::10]])
    folder = data / name / "stack1" / "raw" if name == "vnc_sstem_NC" else data / name
    return np.stack([tifffile.imread(f) for f in sorted(folder.glob("*.tif"))])


# Real tissue, real weights
def test_a_lost_section_is_bridged_better_than_by_interpolation_and_honestly(data: Path, tmp_path: Path) -> None:
    files = sorted((data / "fib25_val" / "grayscale_maps").glob("*.png"))
    volume = np.stack([imread(f) for f in files])
    stack = write_volume(tmp_path / "in.zarr", volume[::5], (50, 10, 10))
    request = Request(input=str(stack), out=str(tmp_path / "out.zarr"), roi="0:7,0:128,0:128", tile=(32, 128, 128))
    whole, codes = compute(request), compute(replace(request, damaged="4"))
    planes = np.arange(16, 25)
    truth, t = volume[planes, :128, :128], (planes - 15) / 10
    linear = volume[15, :128, :128] * (1 - t)[:, None, None] + volume[25, :128, :128] * t[:, None, None]
    mean, spread = codes[0, planes], codes[1, planes] / 8
    assert psnr(whole[0, planes], truth) > psnr(mean, truth) > psnr(linear, truth) + 1
    assert spread.mean() > 1.3 * whole[1, planes].mean() / 8
    assert 0.8 < coverage(mean, spread, truth) < 0.97
