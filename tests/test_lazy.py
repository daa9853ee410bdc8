"""The xarray interface gives the voxels of the command line, lazily."""

from __future__ import annotations

from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from volumes import read, run, small_request, smooth_volume, write_weights

import emdiffuse_vol
from emdiffuse_vol.errors import GeometryError, InputError


def test_it_equals_the_command_line_voxel_by_voxel(tmp_path: Path) -> None:
    request = small_request(tmp_path)
    codes = run(request)
    greys = read(request.input)
    array = xr.DataArray(da.from_array(greys, chunks=(4, 32, 32)), dims=("z", "y", "x"))
    result = emdiffuse_vol.isotropic(
        array, voxel_size=(50, 10, 10), weights=request.weights, shard=request.shard, tile=request.tile
    ).compute()
    assert (result["mean"].values == codes[0]).all()
    assert np.array_equal(result["uncertainty"].values, codes[1] * np.float32(1 / 8))
    assert result["mean"].dtype == np.uint8


def test_nothing_is_computed_until_asked_and_then_only_what_is_needed(tmp_path: Path) -> None:
    computed: list[int] = []

    def section(block_info=None) -> np.ndarray:
        (start, stop), *_ = block_info[None]["array-location"]
        computed.append(start)
        return smooth_volume((stop - start, 60, 100), seed=start)

    array = xr.DataArray(da.map_blocks(section, chunks=((1,) * 40, 60, 100), dtype=np.uint8), dims=("z", "y", "x"))
    weights = str(write_weights(tmp_path / "w.safetensors"))
    result = emdiffuse_vol.isotropic(
        array, voxel_size=(50, 10, 10), weights=weights, shard=(64, 64, 128), tile=(64, 60, 100)
    )
    assert result["mean"].chunks is not None and result.sizes == {"z": 196, "y": 60, "x": 100}
    computed.clear()
    result["mean"][:10, :8, :8].compute(scheduler="synchronous")
    assert computed and max(computed) <= 17  # planes 0..63 and their halo of 4 reach section 15, which sees 17


def test_coordinates_are_in_nanometres_and_give_the_voxel_size(tmp_path: Path) -> None:
    coords = {"z": 100 + 50.0 * np.arange(4), "y": 10.0 * np.arange(30), "x": 10.0 * np.arange(40)}
    array = xr.DataArray(smooth_volume((4, 30, 40)), dims=("z", "y", "x"), coords=coords)
    weights = str(write_weights(tmp_path / "w.safetensors"))
    result = emdiffuse_vol.isotropic(array.transpose("x", "z", "y"), weights=weights, roi="1:3,5:30,0:40")
    assert result.sizes == {"z": 6, "y": 25, "x": 40}
    assert result["z"].values.tolist() == [150, 160, 170, 180, 190, 200]
    assert result["y"].values[0] == 50


@pytest.mark.parametrize(
    ("array", "error", "says"),
    [
        (xr.DataArray(np.zeros((2, 2), np.uint8), dims=("z", "y")), InputError, "expected z, y and x"),
        (xr.DataArray(np.zeros((2, 2, 2)), dims=("z", "y", "x")), InputError, "float64"),
        (xr.DataArray(np.zeros((2, 2, 2), np.uint8), dims=("z", "y", "x")), InputError, "voxel_size"),
    ],
)
def test_arrays_it_cannot_use_are_refused(array, error, says) -> None:
    with pytest.raises(error, match=says):
        emdiffuse_vol.isotropic(array)


def test_a_factor_below_one_is_refused() -> None:
    array = xr.DataArray(smooth_volume((4, 8, 8)), dims=("z", "y", "x"))
    with pytest.raises(GeometryError), dask.config.set(scheduler="synchronous"):
        emdiffuse_vol.isotropic(array, voxel_size=(50, 10, 10), factor=0.5)
