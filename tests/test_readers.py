"""What we write, as readers see it that we did not write: the same voxels, in the same place, in the same channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ngff_zarr
import numpy as np
import ome_zarr_models
import pytest
import tifffile
import xarray as xr
import zarr
from napari_ome_zarr import napari_get_reader
from volumes import read, run, small_request, smooth_volume, write_volume, write_weights

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.export import export
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.region import region_of

SIZE, START, STOP = (40.0, 8.0, 8.0), (2, 10, 20), (6, 42, 290)
ORIGIN = [80.0, 80.0, 160.0]
KINDS = ("reconstruction", "conversion", "old")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """What a run makes of a region, what is converted, and OME-Zarr 0.4: path and voxels [(c,) z, y, x]."""
    folder = tmp_path_factory.mktemp("written")
    greys = smooth_volume(STOP)
    part = region_of(open_volume(write_volume(folder / "in.zarr", greys, SIZE)), Box(START, STOP))
    write_weights(folder / "w.safetensors")
    request = small_request(folder, roi="2:4,10:26,20:290", factor=5, tile=(16, 32, 64), members=2)
    made: dict[str, tuple[Path, np.ndarray]] = {"reconstruction": (folder / "out.zarr", run(request))}
    for kind, format in (("conversion", "ome-zarr"), ("old", "ome-zarr-0.4")):
        export(part, folder / f"{kind}.zarr", format)
        made[kind] = folder / f"{kind}.zarr", greys[Box(START, STOP).slices()]
    return made


def size_of(kind: str) -> list[float]:
    return [8.0 if kind == "reconstruction" else 40.0, 8.0, 8.0]


@pytest.mark.parametrize("kind", KINDS)
def test_zarr_and_xarray_read_the_voxels_and_the_names_of_axes(written: Any, kind: str) -> None:
    path, voxels = written[kind]
    axes = ("c", "z", "y", "x")[-voxels.ndim :]
    group = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(group["0"], voxels)
    coarser = sorted(set(group.array_keys()) - {"0"})
    level = xr.open_zarr(path, consolidated=False, drop_variables=coarser)["0"]
    assert level.dims == axes
    np.testing.assert_array_equal(level.values, voxels)


@pytest.mark.parametrize("kind", KINDS)
def test_ome_zarr_models_and_ngff_zarr_find_it_valid(written: Any, kind: str) -> None:
    path, voxels = written[kind]
    version = "0.4" if kind == "old" else "0.5"
    assert type(ome_zarr_models.open_ome_zarr(str(path), version=version)).__name__ == "Image"  # type: ignore[arg-type]
    full, *coarser = ngff_zarr.from_ngff_zarr(path, validate=True, version=version).images
    assert [full.scale[a] for a in "zyx"] == size_of(kind)
    assert [full.translation[a] for a in "zyx"] == ORIGIN
    assert {full.axes_units[a] for a in "zyx"} == {"nanometer"}
    np.testing.assert_array_equal(full.data, voxels)
    half = [o + s / 2 for o, s in zip(ORIGIN, size_of(kind), strict=True)]
    assert [coarser[0].translation[a] for a in "zyx"] == half


@pytest.mark.parametrize("kind", KINDS)
def test_napari_shows_levels_and_channels_to_scale(written: Any, kind: str) -> None:
    path, voxels = written[kind]
    reader = napari_get_reader(str(path))
    assert reader is not None
    [(levels, about, what)] = reader(str(path))
    assert what == "image"
    assert len(levels) == 2 and levels[1].shape[-1] == 135
    np.testing.assert_array_equal(levels[0], voxels)
    axis = about.get("channel_axis")
    assert axis == (0 if kind == "reconstruction" else None)
    assert list(about["scale"][-3:]) == size_of(kind)  # it reads no translation
    assert about["units"][-3:] == ("nanometer",) * 3
    if axis is not None:
        assert list(about["name"]) == ["out: mean", "out: uncertainty"]


def test_tifffile_finds_the_voxel_size(written: Any) -> None:
    path, _ = written["conversion"]
    export(open_volume(path), path.with_suffix(".tif"), "tiff")
    with tifffile.TiffFile(path.with_suffix(".tif")) as file:
        np.testing.assert_array_equal(file.asarray(), read(path))
        assert file.series[0].axes == "ZYX"
        described = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
    assert [described[f"PhysicalSize{a}"] * 1000 for a in "ZYX"] == pytest.approx(SIZE)
