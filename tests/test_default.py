"""The embedded weights do what the model card says, on real EM that they were never trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from skimage.io import imread
from volumes import MODES, read, smooth_volume, write_volume

from emdiffuse_vol.errors import WeightsError
from emdiffuse_vol.metrics.image import psnr, ssim
from emdiffuse_vol.metrics.interpolation import linear
from emdiffuse_vol.metrics.spread import coverage
from emdiffuse_vol.models.checkpoints import default_weights, embedded, load_weights
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.run import prepare, reconstruct


@pytest.mark.parametrize("name", embedded())
def test_weights_come_with_the_package_and_a_card(name: str) -> None:
    path = embedded()[name]
    assert path.stat().st_size < 16e6
    card = path.with_suffix(".md").read_text()
    assert all(word in card for word in ("Data", "CC-BY", "Recipe", "Calibration", "Limits"))
    weights = load_weights(name)
    (mode,) = weights.metadata["modes"]
    assert weights.name == name and name.startswith(mode.lower())
    calibrated = {"5", "10"} if mode in MODES else {str(weights.metadata.get("factor", 1))}
    assert weights.metadata["calibration"]["scale"].keys() >= calibrated


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_has_weights_of_its_own(tmp_path: Path, mode: str) -> None:
    stack = write_volume(tmp_path / "in.zarr", smooth_volume((6, 40, 40)), (50, 10, 10))
    prepared = prepare(Request(input=str(stack), out=str(tmp_path / "o.zarr"), mode=mode))
    assert prepared.weights.name == default_weights(mode)
    other = next(m for m in MODES if m != mode)
    with pytest.raises(WeightsError, match=f"not {other}"):
        prepare(replace(prepared.request, mode=other, weights=default_weights(mode)))


def test_default_costs_at_most_a_million_flop_per_voxel(tmp_path: Path) -> None:
    stack = write_volume(tmp_path / "in.zarr", smooth_volume((26, 300, 600)), (50, 10, 10))
    plan = prepare(Request(input=str(stack), out=str(tmp_path / "o.zarr"))).summary()
    assert plan["flop_per_voxel_network"] < plan["flop_per_voxel"] < 1e6


@pytest.mark.parametrize("factor", [4, 10])
def test_default_beats_linear_interpolation_and_its_intervals_hold(data: Path, tmp_path: Path, factor: int) -> None:
    files = sorted((data / "fib25_val" / "grayscale_maps").glob("*.png"))
    volume = np.stack([imread(f) for f in files])
    stack = write_volume(tmp_path / "in.zarr", volume[::factor], (10.0 * factor, 10, 10))
    roi = f"0:{80 // factor + 1},0:128,0:128"  # a part, so that the test is quick, reconstructed in its context
    reconstruct(Request(input=str(stack), out=str(tmp_path / "out.zarr"), roi=roi, tile=(84, 128, 128)))
    mean, codes = read(tmp_path / "out.zarr")
    truth = volume[:81, :128, :128]
    hidden = np.arange(81) % factor != 0
    baseline = linear(truth[::factor], factor)
    assert psnr(mean[hidden], truth[hidden]) > psnr(baseline[hidden], truth[hidden]) + 1.2
    assert ssim(mean[hidden], truth[hidden]) > ssim(baseline[hidden], truth[hidden])
    assert 0.85 < coverage(mean[hidden], codes[hidden] / 8, truth[hidden]) < 0.95
