"""`emdvol evaluate`: scores of missing planes only, whatever the blocks, beside linear interpolation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from volumes import run as reconstruct
from volumes import small_request, smooth_volume, write_volume, write_weights

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.evaluation import scores as module
from emdiffuse_vol.evaluation.scores import evaluate
from emdiffuse_vol.evaluation.withheld import withheld
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.metrics.image import psnr, score_image
from emdiffuse_vol.metrics.interpolation import linear
from emdiffuse_vol.stores.image import create_image, finish, open_array, write_units
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.phantom import PhantomVolume
from emdiffuse_vol.stores.volume import VolumeSpec

FACTOR, SHAPE = 4, (13, 40, 44)
STEP = 1 / 8


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return PhantomVolume.of((15, *SHAPE[1:]), (8, 8, 8)).read(Box.of((15, *SHAPE[1:])))


@pytest.fixture(scope="module")
def mean(truth: np.ndarray) -> np.ndarray:
    """Better than linear: half way from it to the truth."""
    half = (linear(truth[: SHAPE[0] : FACTOR], FACTOR) + truth[: SHAPE[0]]) / 2
    return np.rint(half).astype(np.uint8)


def write(path: Path, greys: np.ndarray, attributes: dict[str, Any] | None = None) -> Path:
    axes = "zyx" if greys.ndim == 3 else "czyx"
    chunk = (*greys.shape[:-3], 16, 16, 16)
    create_image(
        str(path),
        shape=greys.shape,
        dtype=str(greys.dtype),
        voxel_size=(8, 8, 8),
        axes=axes,  # type: ignore[arg-type]
        chunk=chunk,
        attributes=attributes,
    )
    array = open_array(str(path), 0, "w")
    size = greys.shape[-3:]
    for index in np.ndindex(*(-(-n // 16) for n in size)):
        start = tuple(16 * i for i in index)
        box = Box(start, tuple(min(a + 16, n) for a, n in zip(start, size, strict=True)))  # type: ignore[arg-type]
        finish(write_units(array, box, greys[(..., *box.slices())]))
    return path


def write_reconstruction(path: Path, mean: np.ndarray, sigma: np.ndarray, **geometry: Any) -> Path:
    codes = np.rint(sigma / STEP).clip(0, 255).astype(np.uint8)
    made = {
        "sealed": True,
        "geometry": {"factor": str(FACTOR), "first_plane": 0, **geometry},
        "uncertainty": {"channel": 1, "step": STEP},
    }
    return write(path, np.stack([mean, codes]), {"emdvol": made})


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def test_scores_are_those_of_the_missing_planes(
    tmp_path: Path, mean: np.ndarray, truth: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = truth[: SHAPE[0]]
    missing = np.arange(SHAPE[0]) % FACTOR != 0
    error = np.abs(mean.astype(float) - common)
    sigma = np.where(missing[:, None, None], 10.0, 0.0) * np.ones(SHAPE)
    recon = write_reconstruction(tmp_path / "iso.zarr", mean, sigma)
    target = write(tmp_path / "truth.zarr", truth)
    monkeypatch.setattr(module, "TILE", 17)
    monkeypatch.setattr(module, "PLANES", 5)
    result = run(recon, target, "--json", tmp_path / "scores.json")
    assert result.exit_code == 0, result.output
    assert "2 more planes" in result.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["planes"] == {"common": 13, "missing": 9}
    assert scores["voxels"] == 9 * 40 * 44
    planes = linear(common[::FACTOR], FACTOR)
    for name, image in (("reconstruction", mean), ("linear", planes)):
        expected = score_image(image[missing], common[missing], 255)
        assert scores[name]["psnr"] == pytest.approx(expected.psnr, abs=1e-6)
        assert scores[name]["ssim"] == pytest.approx(expected.ssim, abs=1e-5)
    assert scores["gain"]["psnr"] > 3
    assert scores["uncertainty"]["coverage"] == pytest.approx(np.mean(error[missing] <= 1.645 * 10))


def test_a_stack_without_uncertainty_needs_the_factor(tmp_path: Path, mean: np.ndarray, truth: np.ndarray) -> None:
    recon, target = write(tmp_path / "iso.zarr", mean), write(tmp_path / "truth.zarr", truth)
    refused = run(recon, target)
    assert refused.exit_code == 1
    assert "--factor" in refused.output
    result = run(recon, target, "--factor", FACTOR)
    assert result.exit_code == 0, result.output
    assert "gain" in result.output
    assert "interval" not in result.output


def test_first_plane_of_a_region_counts(tmp_path: Path, mean: np.ndarray, truth: np.ndarray) -> None:
    part = slice(2, 11)
    recon = write_reconstruction(tmp_path / "iso.zarr", mean[part], np.ones_like(mean[part]), first_plane=2)
    target = write(tmp_path / "truth.zarr", truth[part])
    run(recon, target, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["planes"]["missing"] == sum(p % FACTOR != 0 for p in range(2, 11))
    assert scores["linear"] is None  # planes 2, 3, 9 and 10 have a section on one side only


def test_fractional_factor_has_no_baseline(tmp_path: Path, mean: np.ndarray, truth: np.ndarray) -> None:
    recon = write_reconstruction(tmp_path / "iso.zarr", mean, np.ones_like(mean), factor="9/2")
    target = write(tmp_path / "truth.zarr", truth)
    result = run(recon, target, "--json", tmp_path / "scores.json")
    assert "not scored" in result.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["planes"]["missing"] == 11  # of 13; planes 0 and 9 lie on sections
    assert scores["linear"] is None


def test_identical_volumes_give_valid_json(tmp_path: Path, truth: np.ndarray) -> None:
    target = write(tmp_path / "truth.zarr", truth)
    result = run(target, target, "--factor", 7, "--json", tmp_path / "scores.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "scores.json").read_text())["reconstruction"] == {"psnr": None, "ssim": 1.0}


@pytest.mark.parametrize("shape", [(13, 40, 43), (12, 40, 44)])
def test_volumes_that_do_not_fit_are_one_line_with_both_shapes(
    tmp_path: Path, mean: np.ndarray, truth: np.ndarray, shape: tuple[int, int, int]
) -> None:
    recon = write(tmp_path / "iso.zarr", mean)
    target = write(tmp_path / "truth.zarr", truth[: shape[0], : shape[1], : shape[2]])
    result = run(recon, target, "--factor", FACTOR)
    assert result.exit_code == 1
    assert str(shape) in result.output
    assert str(SHAPE) in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_progress_ends_at_the_total(tmp_path: Path, mean: np.ndarray, truth: np.ndarray) -> None:
    recon, target = (open_volume(write(tmp_path / n, v)) for n, v in (("a.zarr", mean), ("b.zarr", truth)))
    steps: list[tuple[int, int]] = []
    missing = np.arange(13) % FACTOR != 0
    evaluate(recon, None, target, missing, progress=lambda done, total: steps.append((done, total)))
    assert steps[0][0] == 0
    assert steps[-1][0] == steps[-1][1]


class Recorded:
    """A flat volume that remembers the boxes read from it."""

    url, options = "flat", {}

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.spec = VolumeSpec(shape, "uint8", (8.0, 8.0, 8.0))
        self.boxes: list[Box] = []

    def read(self, box: Box) -> np.ndarray:
        assert box in Box.of(self.spec.shape)
        self.boxes.append(box)
        return np.full(box.shape, 7, np.uint8)


@pytest.mark.parametrize("baseline", [True, False])
def test_memory_does_not_grow_with_the_volume(baseline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 32)
    monkeypatch.setattr(module, "PLANES", 10)
    ours, true = Recorded((401, 70, 40)), Recorded((401, 70, 40))
    missing = np.arange(401) % 5 != 0
    scores = evaluate(ours, None, true, missing, baseline=baseline)
    assert scores["voxels"] == missing.sum() * 70 * 40
    assert max(box.size for box in ours.boxes + true.boxes) <= 11 * 38 * 38
    assert scores["gain"] is None or baseline


def test_without_a_truth_every_other_section_is_withheld(tmp_path: Path) -> None:
    request = small_request(tmp_path)
    reconstruct(request)
    result = CliRunner().invoke(main, ["evaluate", request.out, "--json", str(tmp_path / "scores.json")])
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    known = open_volume(request.input).read(Box.of((15, 60, 100)))
    expected = psnr(linear(known[::2], 2)[1::2], known[1::2])
    assert scores["withheld"]["linear"]["psnr"] == pytest.approx(expected)
    assert scores["withheld"]["sections"] == 7 and scores["withheld"]["gap_nm"] == 100
    assert f"{expected:.2f}" in result.output and "sections withheld" in result.output
    assert set(scores["seams"]) == {"x"}  # 100 pixels in two blocks; 60 in one
    assert abs(scores["seams"]["x"]["ratio"] - 1) < 4 * scores["seams"]["x"]["error"]
    # A network that knows nothing but the sections says the same of withheld ones as a run on half the stack.
    again = withheld(open_volume(request.input), weights=request.weights)
    assert again["reconstruction"] == scores["withheld"]["reconstruction"]


def test_sections_too_far_apart_to_withhold_are_said_so(tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    stack = write_volume(folder / "in.zarr", smooth_volume((6, 32, 32)), (120, 10, 10))
    request = small_request(folder, input=str(stack), factor=12, shard=None, tile=None)
    write_weights(folder / "w.safetensors")  # for gaps up to 20 pixels
    reconstruct(request)
    result = CliRunner().invoke(main, ["evaluate", request.out])
    assert result.exit_code == 0, result.output
    assert "No section could be withheld" in result.output and "not 24" in result.output
