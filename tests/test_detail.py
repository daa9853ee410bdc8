"""Scores on regions: what they say of images whose detail is known, and that they look at no more than regions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from scipy.integrate import quad
from scipy.ndimage import gaussian_filter
from scipy.stats import norm
from volumes import smooth_volume, write_volume

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.evaluation import detail as module
from emdiffuse_vol.evaluation.detail import detail, regions
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.metrics.features import fsim
from emdiffuse_vol.metrics.interpolation import linear
from emdiffuse_vol.metrics.perceptual import LAYERS, Gaussian, Lpips, frechet_distance
from emdiffuse_vol.metrics.spectra import axial_correlation, resolution
from emdiffuse_vol.metrics.spread import fair_crps, normal_crps
from emdiffuse_vol.stores.volume import VolumeSpec

FACTOR, SHAPE = 4, (33, 72, 80)
MISSING = np.arange(SHAPE[0]) % FACTOR != 0


def volume(greys: np.ndarray, boxes: list[Box] | None = None) -> Any:
    def read(box: Box) -> np.ndarray:
        if boxes is not None:
            boxes.append(box)
        return greys[box.slices()]

    return SimpleNamespace(url="v", spec=VolumeSpec(greys.shape, str(greys.dtype), (8.0, 8.0, 8.0)), read=read)  # type: ignore[arg-type]


def weights() -> dict[str, torch.Tensor]:
    """Untrained: its numbers mean nothing, but 0 is 0 and more is more."""
    torch.manual_seed(0)
    sizes = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
    found = {}
    for i, (a, b, n) in enumerate(sizes):
        found |= {f"conv{i}.weight": torch.randn(b, a, n, n) / n / a**0.5, f"conv{i}.bias": torch.zeros(b)}
        found[f"linear{i}"] = torch.rand(b)
    assert len(sizes) == len(LAYERS)
    return found


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return smooth_volume(SHAPE)


def test_scores_of_a_small_volume_are_those_of_the_whole(truth: np.ndarray) -> None:
    blurred = np.where(MISSING[:, None, None], gaussian_filter(truth, (1, 0, 0)), truth)
    found = detail(volume(blurred), volume(truth), MISSING, data_range=255, lpips=Lpips(weights()))
    assert (found["regions"], found["region"]) == (1, list(SHAPE))
    chosen = np.flatnonzero(MISSING)[np.linspace(0, 23, module.PLANES).round().astype(int)]
    between = linear(truth[::FACTOR], FACTOR)
    for name, image in (("reconstruction", blurred), ("linear", between)):
        assert found[name]["fsim"] == pytest.approx(fsim(image[chosen], truth[chosen]))
        expected = resolution(axial_correlation(image, truth)) * 8
        assert found[name]["resolution_z_nm"] == pytest.approx(expected)
    assert found["linear"]["detail_z"] < found["reconstruction"]["detail_z"] < 1
    assert 0 < found["reconstruction"]["lpips"] < found["linear"]["lpips"]
    assert 0 < found["reconstruction"]["frechet_alexnet"] < found["linear"]["frechet_alexnet"]
    same = detail(volume(truth), volume(truth), MISSING, data_range=255, lpips=Lpips(weights()), baseline=False)
    perfect = {"fsim": 1, "lpips": 0, "frechet_alexnet": 0, "detail_z": 1}
    perfect |= {"resolution_z_nm": 16, "resolution_xy_nm": 16}
    assert same["reconstruction"] == pytest.approx(perfect, abs=1e-6) and same["linear"] is None


def test_regions_stay_small_and_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((1, 1, 1), (128, 256, 256), (300, 511, 5000)):
        found = list(regions(shape))
        assert 1 <= len(found) <= 8 and len(set(found)) == len(found)
        assert all(box in Box.of(shape) and box.shape == found[0].shape for box in found)
    monkeypatch.setattr(module, "SIDE", 32)
    monkeypatch.setattr(module, "DEPTH", 20)
    boxes: list[Box] = []
    greys = np.broadcast_to(smooth_volume((41, 64, 70)), (41, 64, 70))
    found = detail(volume(greys, boxes), volume(greys, boxes), np.arange(41) % 4 != 0, data_range=255)
    assert found["regions"] == 8 and max(box.size for box in boxes) <= 20 * 32 * 32


def test_crps_of_a_normal_distribution_is_its_integral() -> None:
    """The definition: the squared distance of the distribution from that of a certain truth."""
    for mean, sigma, sought in ((100.0, 5.0, 100.0), (100.0, 5.0, 93.0), (20.0, 0.5, 25.0)):
        below, _ = quad(lambda x, m=mean, s=sigma: norm.cdf(x, m, s) ** 2, mean - 60, sought, points=[mean])
        above, _ = quad(lambda x, m=mean, s=sigma: norm.sf(x, m, s) ** 2, sought, mean + 60, points=[mean])
        found = normal_crps(np.array([mean]), np.array([sigma]), np.array([sought]))
        assert found == pytest.approx(below + above, rel=1e-6)
    members = np.random.default_rng(0).normal(50, 4, (400, 300))
    sought = np.full(300, 47.0)
    drawn = fair_crps(members, sought)
    assert normal_crps(np.full(300, 50.0), np.full(300, 4.0), sought) == pytest.approx(drawn, rel=0.02)
    assert normal_crps(np.array([3.0]), np.array([0.0]), np.array([5.0])) == 2


def test_frechet_distance_is_that_of_the_root_of_a_matrix() -> None:
    draw = np.random.default_rng(0)
    samples = [draw.normal(size=(300, 6)) @ draw.normal(size=(6, 6)) + draw.normal(size=6) for _ in range(2)]
    parts = [Gaussian(6), Gaussian(6)]
    for part, values in zip(parts, samples, strict=True):
        for piece in np.array_split(values, 3):
            part.add(piece)
    (a, b), (p, q) = ((np.cov(v.T) for v in samples), (v.mean(0) for v in samples))
    expected = ((p - q) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(*parts) == pytest.approx(expected)


def test_the_command_prints_draws_and_says_what_is_missing(
    tmp_path: Path, truth: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMDVOL_MODELS", str(tmp_path / "models"))
    truth = truth[:, :64, :64]
    blurred = np.where(MISSING[:, None, None], gaussian_filter(truth, (1, 0, 0)), truth)
    paths = [str(write_volume(tmp_path / f"{n}.zarr", v, (8, 8, 8))) for n, v in (("iso", blurred), ("truth", truth))]
    run = CliRunner()
    shown = run.invoke(main, ["evaluate", *paths, "--factor", "4", "--plots", str(tmp_path / "plots")])
    assert shown.exit_code == 0, shown.output
    assert "FSC z nm" in shown.stdout and "LPIPS and FID are not scored" in shown.stdout
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["frc_xy.png", "fsc_z.png", "power_z.png"]
    save_file(weights(), tmp_path / "lpips.safetensors")
    weighted = ["evaluate", *paths, "--factor", "4", "--json", "-", "--lpips", str(tmp_path / "lpips.safetensors")]
    found = json.loads(run.invoke(main, ["-q", *weighted]).stdout)["detail"]["reconstruction"]
    assert found["lpips"] > 0
    (tmp_path / "lpips.safetensors").write_bytes(b"no weights")
    refused = run.invoke(main, ["-q", *weighted])
    assert refused.exit_code == 1 and "does not hold the weights of LPIPS" in refused.stderr
