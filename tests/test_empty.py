"""Empty cells: found cell by cell, whatever the blocks; filled without a network; nothing else changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from blocks import compute, compute_block, quick, without_network
from hypothesis import given, settings
from hypothesis import strategies as st
from volumes import read, run, small_request, smooth_volume, write_volume

import emdiffuse_vol
from emdiffuse_vol.errors import GeometryError, InputError
from emdiffuse_vol.geometry.boxes import Box, cell_box, cells_meeting
from emdiffuse_vol.geometry.tiles import Tiling
from emdiffuse_vol.models import slab
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.modes import isotropic_mode
from emdiffuse_vol.reconstruct.device import Device
from emdiffuse_vol.reconstruct.empty import Emptiness, Overlay, choose_level, constants, empty_codes, open_emptiness
from emdiffuse_vol.reconstruct.greys import GreyMap
from emdiffuse_vol.reconstruct.job import Job, Request
from emdiffuse_vol.reconstruct.plan import Plan, plan_blocks
from emdiffuse_vol.reconstruct.predict import predict_block
from emdiffuse_vol.reconstruct.predictors import PlanePredictor, Sampling
from emdiffuse_vol.reconstruct.run import prepare
from emdiffuse_vol.stores.convert import convert
from emdiffuse_vol.stores.image import create_image, finish, open_array, write_units
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.volume import mirror_into, mirror_source

SIZE = (50.0, 10.0, 10.0)


def specimen(shape: tuple[int, int, int] = (15, 70, 260), dtype: str = "uint8", grey: float = 0) -> np.ndarray:
    """Tissue at one end of a stack, the rest one grey."""
    greys = smooth_volume(shape, dtype=dtype)
    greys[:, :, 60:] = grey
    return greys


def black_request(folder: Path, greys: np.ndarray | None = None, **changes) -> Request:
    request = small_request(folder)
    write_volume(folder / "black.zarr", specimen() if greys is None else greys, SIZE)
    return replace(request, input=str(folder / "black.zarr"), **changes)


# Where another volume lies
numbers = st.floats(0.3, 9).map(lambda v: round(v, 2))


@settings(deadline=None)
@given(numbers, st.floats(-9, 9).map(lambda v: round(v, 2)), st.integers(0, 20), st.integers(1, 20), st.integers(0, 2))
def test_an_overlay_gives_the_voxels_that_share_space(step: float, offset: float, start: int, size: int, border: int):
    class Long:
        spec = type("Spec", (), {"shape": (1000, 1, 1)})

    overlay = Overlay(Long(), (step, 1, 1), (offset + 40, 0, 0))  # type: ignore[arg-type]
    low, high = start - 0.5 + 60, start + size - 0.5 + 60
    box = overlay.over((low, -0.5, -0.5), (high, 0.5, 0.5), border)
    centre = offset + 40 + np.arange(1000) * step
    shared = np.flatnonzero((centre + step / 2 > low + 1e-5 * step) & (centre - step / 2 < high - 1e-5 * step))
    first, last = max(0, shared[0] - border) if shared.size else 0, shared[-1] + border + 1 if shared.size else 0
    assert (box.start[0], box.stop[0]) == (first, last) if shared.size else border or box.empty


def test_constants_are_the_ends_of_the_range_and_zero() -> None:
    assert [constants(d) for d in ("uint8", "uint16", "int16", "float32")] == [
        (0, 255),
        (0, 65535),
        (-32768, 0, 32767),
        (0,),
    ]


# Which cells are empty
def empty_cells(plan: Plan, greys: np.ndarray) -> set[tuple[int, int, int]]:
    """By the rule, tile by tile."""
    found = set()
    for cell in cells_meeting(Box.of(plan.mode.output_shape), plan.tiling.core):
        box = plan.mode.read_box(plan.tiling.input_box(cell))
        seen = greys[mirror_source(box, greys.shape).slices()]
        if seen.min() == seen.max() and float(seen.min()) in constants(str(greys.dtype)):
            found.add(cell)
    return found


@pytest.mark.parametrize(("dtype", "grey"), [("uint8", 0), ("uint8", 255), ("uint16", 65535), ("float32", 0)])
def test_constant_cells_are_filled_and_the_others_are_as_ever(tmp_path: Path, dtype: str, grey: int) -> None:
    greys = specimen(dtype=dtype, grey=grey)
    request = black_request(tmp_path, greys)
    plan = prepare(request).plan
    cells = empty_cells(plan, greys)
    assert len(cells) == 12
    skipped, whole = quick(request), quick(replace(request, skip_empty=False))
    inside = np.zeros(plan.mode.output_shape, bool)
    for cell in cells:
        inside[(cell_box(cell, plan.tiling.core) & Box.of(plan.mode.output_shape)).slices()] = True
    assert (skipped[0, inside] == grey).all() and (skipped[1, inside] == 0).all()
    assert (skipped[:, ~inside] == whole[:, ~inside]).all()
    assert (whole[1, inside] > 0).any()


def test_greys_that_mean_something_are_never_skipped(tmp_path: Path) -> None:
    request = black_request(tmp_path, specimen(grey=77))
    prepared = prepare(request)
    assert not open_emptiness(prepared.job).fills(prepared.plan[3], np.full((99, 400, 400), 77, np.uint8))
    assert (quick(request) == quick(replace(request, skip_empty=False))).all()


@pytest.mark.parametrize("pyramid", [False, True])
def test_blocks_and_regions_do_not_matter(tmp_path: Path, pyramid: bool) -> None:
    request = black_request(tmp_path)
    if pyramid:
        convert(open_volume(request.input), tmp_path / "levels.zarr")
        request = replace(request, input=str(tmp_path / "levels.zarr"))
        assert prepare(request).job.empty["coarse"]["level"] == 1
    codes = quick(request)
    assert 0.3 < (codes[1] == 0).mean() < 0.9
    for block in ((128, 64, 64), (64, 128, 320)):
        assert (quick(replace(request, block=block)) == codes).all()
    part = quick(replace(request, roi="3:12,20:70,20:260"))
    assert (part == codes[:, 15:56, 20:70, 20:260]).all()


def test_damaged_sections_do_not_make_a_cell_less_empty_where_all_is_read(tmp_path: Path) -> None:
    greys = specimen()
    greys[[4, 9]] = 99
    request = black_request(tmp_path, greys, damaged="4,9")
    prepared = prepare(request)
    good = np.delete(greys, [4, 9], axis=0)
    cells = empty_cells(prepared.plan, good)
    blocks = [prepared.plan[index] for index in range(len(prepared.plan))]
    found = [open_emptiness(prepared.job).fills(block, stack(good, block.read)) for block in blocks]
    assert {cell for fills in found for cell in fills} == cells and len(cells) == 12


def stack(greys: np.ndarray, box: Box) -> np.ndarray:
    source = mirror_source(box, greys.shape)
    return mirror_into(greys[source.slices()], source, box, greys.shape)


# Pyramids
@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Levels of 1, 2 and 4 voxels."""
    folder = tmp_path_factory.mktemp("levels")
    greys = np.zeros((15, 700, 600), np.uint8)
    greys[:, :300, :340] = smooth_volume((15, 300, 340))
    write_volume(folder / "in.zarr", greys, SIZE)
    convert(open_volume(folder / "in.zarr"), folder / "levels.zarr")
    return folder


def test_the_coarsest_level_with_four_voxels_in_a_cell_is_looked_at(levels: Path) -> None:
    volume = open_volume(levels / "levels.zarr")
    for core, level in (((64, 64, 64), 2), ((64, 16, 64), 2), ((64, 64, 12), 1), ((64, 64, 4), None)):
        chosen = choose_level(volume, core)
        assert (chosen and chosen.volume.options["level"]) == level
    assert choose_level(open_volume(levels / "in.zarr"), (64, 64, 64)) is None
    chosen = choose_level(volume, (64, 64, 64))
    assert chosen.step == (4, 4, 4) and chosen.offset == (1.5, 1.5, 1.5)


def test_a_voxel_size_that_the_user_corrects_moves_no_level(levels: Path) -> None:
    chosen = choose_level(open_volume(levels / "levels.zarr", voxel_size=(45, 4.3, 4.3)), (64, 64, 64))
    assert chosen.step == (4, 4, 4)


def test_a_coarse_level_finds_the_same_but_for_a_border(levels: Path) -> None:
    request = replace(small_request(levels / "w"), input=str(levels / "levels.zarr"), shard=(64, 64, 128))
    prepared = prepare(request)
    plan, emptiness = prepared.plan, open_emptiness(prepared.job)
    exact = empty_cells(plan, open_volume(levels / "in.zarr").read(Box.of((15, 700, 600))))
    found = {cell for index in range(len(plan)) for cell in emptiness.fills(plan[index])}
    assert found <= exact and len(found) > 0.75 * len(exact)


def test_a_whole_block_is_told_without_reading_it(levels: Path) -> None:
    request = replace(small_request(levels / "w"), input=str(levels / "levels.zarr"))
    prepared = prepare(request)
    plan, emptiness = prepared.plan, open_emptiness(prepared.job)
    told = [emptiness.whole(plan[index]) for index in range(len(plan))]
    assert set(told) == {None, 0.0} and told[0] is None and told[-1] == 0.0
    quickly = without_network(prepared)
    codes = compute_block(quickly, plan[len(plan) - 1])
    assert not quickly.predictor.asked
    assert (codes == empty_codes(plan[len(plan) - 1], 0.0, "uint8")).all() and not codes.any()


@pytest.mark.parametrize("built", [0, 1])
def test_levels_that_were_never_filled_are_not_believed(levels: Path, tmp_path: Path, built: int) -> None:
    greys = open_volume(levels / "in.zarr").read(Box.of((15, 700, 600)))
    create_image(
        str(tmp_path / "v.zarr"), shape=greys.shape, dtype="uint8", voxel_size=SIZE, chunk=(8, 64, 64), levels=3
    )
    finish(write_units(open_array(str(tmp_path / "v.zarr"), 0, "w"), Box.of(greys.shape), greys))
    if built:
        coarse = open_volume(levels / "levels.zarr", level=1)
        box = Box.of(coarse.spec.shape)
        finish(write_units(open_array(str(tmp_path / "v.zarr"), 1, "w"), box, coarse.read(box)))
    chosen = choose_level(open_volume(tmp_path / "v.zarr"), (64, 64, 64))
    assert (chosen.volume.options["level"] if chosen else 0) == built


# Masks
@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, np.ndarray]:
    """A coarse mask that begins before the volume and ends inside it."""
    folder = tmp_path_factory.mktemp("mask")
    request = small_request(folder, tile=(16, 32, 32), mask=str(folder / "mask.zarr"))
    mask = np.zeros((5, 4, 6), np.uint8)
    mask[1:4, 1:3, 1:4] = 7
    create_image(
        str(folder / "mask.zarr"), shape=mask.shape, dtype="uint8", voxel_size=(170, 190, 150), origin=(-80, -110, -30),
        chunk=(4, 4, 4),
    )  # fmt: skip
    finish(write_units(open_array(str(folder / "mask.zarr"), 0, "w"), Box.of(mask.shape), mask))
    return request, mask


def test_cells_outside_the_mask_are_zero_and_the_others_are_as_ever(masked) -> None:
    request, mask = masked
    codes, whole = quick(request), quick(replace(request, mask=None))
    plan = prepare(request).plan
    outside = np.zeros(plan.mode.output_shape, bool)
    for cell in cells_meeting(Box.of(plan.mode.output_shape), plan.tiling.core):
        box = cell_box(cell, plan.tiling.core) & Box.of(plan.mode.output_shape)
        # Every nanometre of the cell, planes being 10 nm apart and pixels 10 nm wide.
        places = [np.arange(a * 10 - 4.5, b * 10 - 5) for a, b in zip(box.start, box.stop, strict=True)]
        geometry = zip(places, (-80, -110, -30), (170, 190, 150), mask.shape, strict=True)
        index = [np.floor((p - o) / v + 0.5).astype(int) for p, o, v, _ in geometry]
        inside = [np.unique(i[(i >= 0) & (i < n)]) for i, n in zip(index, mask.shape, strict=True)]
        outside[box.slices()] = not mask[np.ix_(*inside)].any()
    assert 0.2 < outside.mean() < 0.8
    assert not codes[:, outside].any()
    assert (codes[:, ~outside] == whole[:, ~outside]).all()


def test_a_mask_needs_no_look_at_the_input(masked) -> None:
    request, _ = masked
    emptiness = open_emptiness(prepare(replace(request, tile=(16, 64, 64))).job)
    told = [emptiness.whole(emptiness.plan[index]) for index in range(4)]
    assert told[0] is None
    assert replace(emptiness, mask=None).whole(emptiness.plan[3]) is None


def test_a_mask_that_cannot_be_used_is_refused_in_one_line(masked, tmp_path: Path) -> None:
    request, _ = masked
    with pytest.raises(InputError, match=r"^--mask: .* does not exist"):
        prepare(replace(request, mask=str(tmp_path / "none.zarr")))
    beside = tmp_path / "beside.zarr"
    create_image(str(beside), shape=(2, 2, 2), dtype="uint8", voxel_size=SIZE, origin=(0, 1e5, 0), chunk=(2, 2, 2))
    with pytest.raises(GeometryError, match="lies beside the input"):
        prepare(replace(request, mask=str(beside)))


def test_a_job_survives_json_and_what_decides_is_in_the_fingerprint(masked, tmp_path: Path) -> None:
    import shutil

    request, _ = masked
    job = prepare(request).job
    assert Job.of(json.loads(json.dumps(job.stored()))) == job
    moved = shutil.copytree(request.mask, tmp_path / "mask.zarr")
    assert prepare(replace(request, mask=str(moved))).job.fingerprint() == job.fingerprint()
    assert prepare(replace(request, mask=None)).job.fingerprint() != job.fingerprint()
    assert prepare(replace(request, skip_empty=False)).job.fingerprint() != job.fingerprint()


# Networks that see their whole tile
def test_blended_tiles_around_empty_cells_are_computed_and_only_those(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = UNet(in_channels=3, slices=True).eval().requires_grad_(False)
    sections = np.zeros((2, 140, 150), np.uint8)
    sections[:, :40, :40] = smooth_volume((2, 40, 40))
    mode = isotropic_mode(sections.shape, (20, 10, 10))
    predictor = PlanePredictor(net, mode, Sampling(2, 0, "ddim", 1, (1, 28, 28)), Device("cpu", "float32"))

    def codes_of(block_shape, skip: bool) -> np.ndarray:
        plan = plan_blocks(mode, mode.region(None), predictor.tiling, block_shape, (64, 64, 64))
        result = np.empty((2, *plan.region.shape), np.uint8)
        for block in map(plan.__getitem__, range(len(plan))):
            greys = stack(sections, block.read)
            fills = Emptiness(plan, constants("uint8")).fills(block, greys) if skip else None
            result[(slice(None), *block.write.slices())] = predict_block(
                plan, block, predictor, greys, GreyMap(0, 255), 1.0, fills
            )
        return result

    whole, skipped = codes_of((64, 192, 192), False), codes_of((64, 192, 192), True)
    plan = plan_blocks(mode, mode.region(None), predictor.tiling, None, (64, 192, 192))
    fills = Emptiness(plan, constants("uint8")).fills(plan[0], stack(sections, plan[0].read))
    empty = np.zeros(plan.region.shape, bool)
    for cell in fills:
        empty[(cell_box(cell, plan.tiling.core) & plan.region).slices()] = True
    assert empty[1].any() and not skipped[:, empty].any() and whole[1, 1][empty[1]].any()
    assert (skipped[:, ~empty] == whole[:, ~empty]).all()
    assert (codes_of((64, 64, 64), True) == skipped).all()
    predicted = []
    original = PlanePredictor.__call__
    monkeypatch.setattr(
        PlanePredictor, "__call__", lambda self, tiles: predicted.extend(t.box for t in tiles) or original(self, tiles)
    )
    codes_of((64, 192, 192), True)
    cells = {cell for cell in cells_meeting(plan.region, plan.tiling.core) if cell[0] == 1 and cell not in fills}
    assert len(predicted) == len(set(predicted)) < 36
    for box in predicted:
        reached = plan.tiling.input_box((1, 0, 0)).shape == box.shape
        assert reached and any(not (cell_box(cell, plan.tiling.core) & box).empty for cell in cells)


def test_a_block_is_told_in_milliseconds() -> None:
    import time

    mode = isotropic_mode((60, 1000, 1000), (50, 10, 10))
    coarse = np.zeros((60, 20, 20), np.uint8)

    class Coarse:
        spec = type("Spec", (), {"shape": coarse.shape})

        def read(self, box: Box) -> np.ndarray:
            return coarse[box.slices()]

    overlay = Overlay(Coarse(), (1, 50, 50), (0, 24.5, 24.5))  # type: ignore[arg-type]
    # Blocks of a second and of hours of computing.
    for tiling, cells, seconds in (
        (Tiling((64, 256, 256), slab.HALO), 4 * 16, 0.02),
        (Tiling((1, 224, 224), (0, 16, 16), True), 256 * 25, 0.5),
    ):
        plan = plan_blocks(mode, mode.region(None), tiling, None, (256, 1024, 1024))
        emptiness, block = Emptiness(plan, (0.0, 255.0), overlay), plan[0]
        started = time.process_time()
        assert emptiness.whole(block) == 0
        assert time.process_time() - started < seconds
        assert len(emptiness.fills(block)) == cells


# Whole runs
def thin_request(folder: Path) -> Request:
    greys = np.zeros((3, 60, 200), np.uint8)
    greys[:, :, :40] = smooth_volume((3, 60, 40))
    return black_request(folder, greys)


def test_a_run_skips_what_is_empty(tmp_path: Path) -> None:
    request = thin_request(tmp_path)
    codes = run(request)
    assert (codes == compute(request)).all()
    assert not codes[:, :, :, 128:].any() and (codes[1, 1, :, :128] > 0).mean() > 0.9


def test_the_xarray_interface_skips_too(tmp_path: Path) -> None:
    request = thin_request(tmp_path)
    array = xr.DataArray(read(request.input), dims=("z", "y", "x"))
    result = emdiffuse_vol.isotropic(
        array, voxel_size=SIZE, weights=request.weights, shard=request.shard, tile=request.tile
    ).compute(scheduler="synchronous")
    codes = compute(request)
    assert (result["mean"].values == codes[0]).all()
    assert np.array_equal(result["uncertainty"].values, codes[1] * np.float32(1 / 8))
