"""Laws of boxes, axial grids, tiles and plans."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emdiffuse_vol.errors import GeometryError
from emdiffuse_vol.geometry.axial import AxialGrid, exact_ratio, parse_factor
from emdiffuse_vol.geometry.boxes import Box, Triple, cell_box, cells_meeting, grid_shape, reflect
from emdiffuse_vol.geometry.tiles import Tiling, ramp_window
from emdiffuse_vol.modes import isotropic_mode
from emdiffuse_vol.reconstruct.plan import default_shard, plan_blocks

small = st.integers(1, 40)
factors = st.fractions(min_value=Fraction(11, 10), max_value=12, max_denominator=50)


def triple(low: int, high: int) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(*[st.integers(low, high)] * 3)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    start, shape = draw(triple(-30, 30)), draw(triple(0, 30))
    return Box(start, tuple(a + n for a, n in zip(start, shape, strict=True)))


def mark(box: Box) -> np.ndarray:
    grid = np.zeros((120, 120, 120), bool)
    grid[box.shift((40, 40, 40)).slices()] = True
    return grid


@settings(max_examples=40, deadline=None)
@given(boxes(), boxes())
def test_intersection_holds_the_common_voxels_and_only_those(a: Box, b: Box) -> None:
    assert (mark(a & b) == (mark(a) & mark(b))).all()
    assert (a & b).size == (mark(a) & mark(b)).sum()
    assert not a.empty or a.size == 0


@given(boxes(), boxes())
def test_union_holds_both(a: Box, b: Box) -> None:
    assert a in (a | b) and b in (a | b)


@settings(deadline=None)
@given(boxes().filter(lambda b: not b.empty), triple(1, 9))
def test_cells_meeting_a_box_are_those_that_share_voxels(box: Box, cell: tuple[int, int, int]) -> None:
    found = set(cells_meeting(box, cell))
    assert all(not (cell_box(index, cell) & box).empty for index in found)
    assert sum((cell_box(index, cell) & box).size for index in found) == box.size


@given(st.integers(2, 20), st.integers(-60, 60))
def test_reflect_is_numpys(size: int, index: int) -> None:
    wide = np.pad(np.arange(size), 200, mode="reflect")
    assert reflect(np.array([index]), size)[0] == wide[index + 200]


def test_reflect_of_one_voxel_is_that_voxel() -> None:
    assert (reflect(np.arange(-3, 4), 1) == 0).all()


@given(st.integers(2, 50), st.integers(2, 12))
def test_whole_factors_give_r_planes_per_section_and_one(sections: int, factor: int) -> None:
    grid = AxialGrid(sections, Fraction(factor))
    assert grid.planes == (sections - 1) * factor + 1
    assert grid.measured(np.arange(grid.planes)).sum() == sections


@given(st.integers(2, 50), factors, st.integers(-200, 200))
def test_planes_lie_where_the_fraction_says(sections: int, factor: Fraction, plane: int) -> None:
    grid = AxialGrid(sections, factor)
    index, t = grid.locate(np.array([plane]))
    position = Fraction(plane) / factor
    assert index[0] == position.__floor__()
    assert t[0] == np.float32(float(position - position.__floor__()))
    assert 0 <= t[0] < 1
    assert grid.measured(np.array([plane]))[0] == (position.denominator == 1)


@given(st.integers(2, 50), factors)
def test_the_last_plane_is_the_last_that_has_sections_on_both_sides(sections: int, factor: Fraction) -> None:
    planes = AxialGrid(sections, factor).planes
    assert (planes - 1) / factor <= sections - 1 < planes / factor


@given(st.integers(2, 30), factors, st.data())
def test_planes_between_sections_of_a_region(sections: int, factor: Fraction, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, sections - 2))
    last = data.draw(st.integers(first + 1, sections - 1))
    start, stop = AxialGrid(sections, factor).planes_between(first, last)
    inside = [p for p in range(-5, int(sections * factor) + 5) if first <= Fraction(p) / factor <= last]
    assert list(range(start, stop)) == inside


def test_fanc_factor_is_exact() -> None:
    assert exact_ratio(45.0, 4.3) == Fraction(450, 43)
    assert exact_ratio(45.0, float(np.float32(4.3))) == Fraction(450, 43)
    assert parse_factor("450/43") == Fraction(450, 43)


@pytest.mark.parametrize("text", ["ten", "1/0", ""])
def test_factor_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(GeometryError, match="is not a number"):
        parse_factor(text)


def test_default_factor_is_the_whole_number_that_makes_z_nearest_to_xy() -> None:
    assert isotropic_mode((5, 9, 9), (45, 4.3, 4.3)).axial.factor == 10
    assert isotropic_mode((5, 9, 9), (48, 8, 8)).axial.factor == 6
    assert isotropic_mode((5, 9, 9), (12, 8, 8)).axial.factor == 2
    assert isotropic_mode((5, 9, 9), (45, 4.3, 4.3), target=4.3).axial.factor == Fraction(450, 43)


@pytest.mark.parametrize(
    ("shape", "voxel", "message"),
    [
        ((5, 9, 9), (4, 8, 8), "already as fine"),
        ((1, 9, 9), (40, 8, 8), "1 section"),
        ((5, 9, 9), (8, 8, 8), "as fine"),
    ],
)
def test_volumes_that_need_nothing_are_refused(shape: tuple, voxel: tuple, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        isotropic_mode(shape, voxel)


@given(st.integers(1, 40), st.integers(0, 20))
def test_windows_of_neighbours_sum_to_one(core: int, halo: int) -> None:
    halo = min(halo, core // 2)
    total = np.zeros(core * 7, np.float32)
    for tile in range(1, 6):
        total[tile * core - halo : (tile + 1) * core + halo] += ramp_window(core, halo, blend=True)
    assert np.allclose(total[2 * core : 5 * core], 1, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_windows_of_a_tiling_sum_to_one_over_any_box(data: st.DataObject) -> None:
    blend = data.draw(st.booleans())
    core = data.draw(triple(4, 12))
    halo = data.draw(triple(0, 2))
    tiling = Tiling(core, (0, *halo[1:]) if blend else halo, blend)
    box = data.draw(boxes().filter(lambda b: not b.empty))
    total = np.zeros(box.shape, np.float32)
    for tile in tiling.tiles_for(box):
        part = tiling.reach_box(tile) & box
        total[part.slices(box.start)] += tiling.window()[part.slices(tiling.reach_box(tile).start)]
    assert np.allclose(total, 1, atol=1e-6)


@st.composite
def plans(draw: st.DrawFn):
    shape = (draw(st.integers(2, 12)), draw(st.integers(1, 300)), draw(st.integers(1, 300)))
    factor = draw(factors)
    mode = isotropic_mode(shape, (40, 4, 4), factor)
    low = tuple(draw(st.integers(0, max(0, n - 2))) for n in shape)
    high = tuple(draw(st.integers(a + 1 + (axis == 0), n)) for axis, (a, n) in enumerate(zip(low, shape, strict=True)))
    region = mode.region(draw(st.sampled_from([None, Box(low, high)])))
    if region.empty:
        region = mode.region(None)
    blend = draw(st.booleans())
    tiling = Tiling((1, 56, 56), (0, 4, 4), True) if blend else Tiling((16, 64, 64), (6, 32, 32))
    shard = tuple(64 * draw(st.integers(1, 2)) for _ in range(3))
    block = tuple(n * draw(st.integers(1, 2)) for n in shard)
    return plan_blocks(mode, region, tiling, block, shard)


@settings(deadline=None, max_examples=60)
@given(plans())
def test_write_boxes_partition_the_region(plan) -> None:
    written = np.zeros(plan.region.shape, np.uint8)
    for index in range(len(plan)):
        box = plan.write_box(index)
        assert not box.empty and box in plan.region
        written[box.slices(plan.region.start)] += 1
    assert (written == 1).all()


@settings(deadline=None, max_examples=60)
@given(plans())
def test_no_shard_has_two_writers(plan) -> None:
    owners: dict[tuple[int, ...], int] = {}
    for index in range(len(plan)):
        for shard in cells_meeting(plan.write_box(index).shift(plan.offset), plan.shard):
            assert owners.setdefault(shard, index) == index


@settings(deadline=None, max_examples=40)
@given(plans())
def test_blocks_read_all_their_planes_need(plan) -> None:
    for index in {0, len(plan) - 1}:
        block = plan[index]
        assert block.write in block.predict
        for plane in (block.predict.start[0], block.predict.stop[0] - 1):
            section = (Fraction(plane) / plan.mode.axial.factor).__floor__()
            assert block.read.start[0] <= section - 1 and section + 2 < block.read.stop[0]


@settings(deadline=None, max_examples=40)
@given(plans())
def test_pieces_of_a_block_partition_it(plan) -> None:
    block = plan[len(plan) - 1]
    filled = np.zeros(block.write.shape, np.uint8)
    for piece, tiles in plan.pieces(block.write):
        assert tiles and piece in block.write
        filled[piece.slices(block.write.start)] += 1
    assert (filled == 1).all()


def test_a_plan_of_a_cubic_millimetre_costs_nothing_until_asked() -> None:
    mode = isotropic_mode((25_000, 125_000, 125_000), (40, 8, 8))
    shard = default_shard(mode.output_shape)
    plan = plan_blocks(mode, mode.region(None), Tiling((64, 256, 256), (6, 32, 32)), None, shard)
    assert shard == (256, 1024, 1024)
    assert len(plan) == np.prod(grid_shape(mode.output_shape, shard)) == 489 * 123 * 123
    assert plan[len(plan) - 1].write.stop == mode.output_shape


@pytest.mark.parametrize(
    ("block", "shard", "message"),
    [((96, 256, 256), (64, 256, 256), "use --block 128,256,256"), (None, (60, 256, 256), "use --shard 64,256,256")],
)
def test_sizes_that_do_not_fit_are_refused_with_ones_that_do(block, shard, message) -> None:
    mode = isotropic_mode((20, 600, 600), (40, 8, 8))
    with pytest.raises(GeometryError, match=message):
        plan_blocks(mode, mode.region(None), Tiling((64, 256, 256), (6, 32, 32)), block, shard)


def test_region_outside_the_input_is_refused() -> None:
    mode = isotropic_mode((5, 90, 90), (40, 8, 8))
    with pytest.raises(GeometryError, match="not inside the input, which is 0:5,0:90,0:90"):
        mode.region(Box((0, 0, 0), (5, 91, 90)))


@pytest.mark.parametrize(("tile", "block"), [((64, 128, 192), (64, 128, 192)), ((16, 96, 64), (64, 64, 64))])
def test_blocks_hold_the_tiles_that_are_larger_than_a_shard(tile: Triple, block: Triple) -> None:
    mode = isotropic_mode((15, 300, 300), (50, 10, 10))
    assert plan_blocks(mode, mode.region(None), Tiling(tile, (4, 32, 32)), None, (64, 64, 64)).block == block
