"""emdvol info: what it prints is true, and what is wrong with a volume is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.stores.convert import convert
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.survey import DEEPEST_RUN, PATCH, SECTIONS, ranges, sample_runs
from emdiffuse_vol.stores.suspicions import contrast_problems
from emdiffuse_vol.stores.volume import VolumeSpec


def greys(shape: tuple[int, ...] = (12, 80, 90)) -> NDArray[Any]:
    return np.random.default_rng(2).integers(1, 250, shape, dtype=np.uint8)


def info(path: Path, data: NDArray[Any], voxel_size: str = "40,8,8") -> dict[str, Any]:
    tifffile.imwrite(path / "v.tif", data, photometric="minisblack")
    result = CliRunner().invoke(main, ["info", str(path / "v.tif"), "--voxel-size", voxel_size, "--json"])
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def test_facts_of_a_sound_volume(tmp_path: Path) -> None:
    data = greys()
    facts = info(tmp_path, data)
    assert (facts["shape"], facts["dtype"], facts["axes"]) == ([12, 80, 90], "uint8", "zyx")
    assert (facts["voxel_size_nm"], facts["factor_to_isotropy"]) == ([40, 8, 8], 5)
    assert facts["problems"] == []
    exact = np.percentile(data, (0.5, 50, 99.5))
    assert list(facts["percentiles"].values()) == pytest.approx(exact, abs=3)


def test_black_and_constant_sections_are_seen(tmp_path: Path) -> None:
    data = greys()
    data[[0, 7, 8]] = 0
    data[3] = 99
    facts = info(tmp_path, data)
    assert facts["problems"] == ["black sections: 0, 7-8", "constant sections: 3"]
    assert facts["constant_sections"] == [0, 3, 7, 8]
    assert facts["percentiles"]["0.5"] > 0


def test_a_black_volume_is_no_crash(tmp_path: Path) -> None:
    assert info(tmp_path, np.zeros((3, 9, 9), np.uint8))["problems"] == ["black sections: 0-2"]


def test_saturated_greys_are_seen(tmp_path: Path) -> None:
    data = greys()
    data[:, :, :20] = 255
    (problem,) = info(tmp_path, data)["problems"]
    assert problem.startswith("saturated greys: ")
    assert problem.endswith("the brightest grey, 255")


def test_wrong_voxel_sizes_are_seen(tmp_path: Path) -> None:
    assert "z (4 nm) is finer than y and x (8 nm)" in info(tmp_path, greys(), "4,8,8")["problems"][0]
    assert "pixels are not square: y 8 nm, x 6 nm" in info(tmp_path, greys(), "40,8,6")["problems"][0]


def test_greys_that_are_no_numbers_are_seen(tmp_path: Path) -> None:
    data = greys().astype(np.float32)
    data[:, 40] = np.nan
    (problem,) = info(tmp_path, data)["problems"]
    assert problem.endswith("of the sample is not a finite number")


def tissue(seed: int = 3) -> NDArray[Any]:
    """Cells with thin dark membranes between them, coarser along z: [30, 200, 180]."""
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(np.random.default_rng(seed).standard_normal((30, 200, 180)), (1, 5, 5))
    noise = np.random.default_rng(seed + 1).normal(0, 3, field.shape)
    return np.clip(170 - 90 * (np.abs(field) < 0.1 * field.std()) + noise, 1, 255).astype(np.uint8)


def test_inverted_contrast_is_suspected(tmp_path: Path) -> None:
    assert info(tmp_path, tissue())["problems"] == []
    (problem,) = info(tmp_path, 255 - tissue())["problems"]
    assert problem.startswith("contrast may be inverted")


def test_noise_alone_is_not_suspected() -> None:
    rng = np.random.default_rng(4)
    for distribution in (rng.standard_normal, rng.random):
        assert list(contrast_problems([distribution((64, 64)) for _ in range(40)])) == []


@pytest.mark.parametrize(("order", "axis"), [((1, 0, 2), "y"), ((2, 1, 0), "x")])
def test_a_wrong_order_of_axes_is_suspected(tmp_path: Path, order: Triple, axis: str) -> None:
    (problem,) = info(tmp_path, np.ascontiguousarray(tissue().transpose(order)))["problems"]
    assert problem.startswith(f"greys change most along {axis}")
    assert problem.endswith("check the order of the axes")


def test_stored_axes_are_told(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "v.zarr", mode="w")
    group.create_array("0", data=greys((1, 12, 80, 90)), chunks=(1, 4, 64, 64))
    axes = [{"name": a, "type": "channel" if a == "c" else "space"} for a in "cxyz"]
    scale = {"type": "scale", "scale": [1.0, 8.0, 8.0, 40.0]}
    datasets = [{"path": "0", "coordinateTransformations": [scale]}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    result = CliRunner().invoke(main, ["info", str(tmp_path / "v.zarr"), "--json"])
    facts = json.loads(result.stdout)
    assert (facts["stored_axes"], facts["shape"]) == (["c", "x", "y", "z"], [90, 80, 12])
    assert "c x y z as stored, read as z y x" in CliRunner().invoke(main, ["info", str(tmp_path / "v.zarr")]).output


def test_real_volumes_are_not_suspected(data: Path) -> None:
    for name, size in (("celegans_tiff_series", "50,4,4"), ("gala_fib_hdf5/train-image.h5", "8,8,8")):
        result = CliRunner().invoke(main, ["info", str(data / name), "--voxel-size", size, "--json"])
        assert result.exit_code == 0, result.output
        assert not any("inverted" in p or "axes" in p for p in json.loads(result.stdout)["problems"])


def test_the_table_of_an_ome_zarr(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "v.tif", greys(), photometric="minisblack")
    convert(open_volume(tmp_path / "v.tif", voxel_size=(40, 8, 8)), tmp_path / "v.zarr")
    result = CliRunner().invoke(main, ["info", str(tmp_path / "v.zarr")])
    assert result.exit_code == 0
    for expected in ("OME-Zarr 0.5, uint8", "12 x 80 x 90", "40 x 8 x 8 nm", "5 to isotropy", "none seen"):
        assert expected in result.output


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "v.tif", greys(), photometric="minisblack")
    for name, expected in (("v.tif", "give --voxel-size Z,Y,X"), ("other", "does not exist")):
        result = CliRunner().invoke(main, ["info", str(tmp_path / name)])
        assert result.exit_code == 1
        assert len(result.output.splitlines()) == 1
        assert expected in result.output


def test_a_real_series(data: Path) -> None:
    folder = data / "celegans_tiff_series"
    result = CliRunner().invoke(main, ["info", str(folder), "--voxel-size", "50,4,4", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["shape"], facts["factor_to_isotropy"]) == ([21, 256, 256], 12.5)
    assert facts["constant_sections"] == []


@given(st.tuples(*[st.integers(1, 100_000)] * 3), st.integers(1, 128))
@settings(max_examples=50, deadline=None)
def test_the_sample_is_inside_and_bounded(shape: Triple, thick: int) -> None:
    spec = VolumeSpec(shape, "uint8", (40, 8, 8), chunk=(thick, 64, 64))
    boxes = [box for run in sample_runs(spec) for box in run]
    assert all(box in Box.of(shape) and not box.empty for box in boxes)
    assert len(set(boxes)) == len(boxes)
    assert sum(box.size for box in boxes) <= 5 * PATCH**2 * max(SECTIONS, 16 * DEEPEST_RUN)


def test_ranges_join_neighbours() -> None:
    assert ranges([3, 7, 8, 9, 11]) == "3, 7-9, 11"
