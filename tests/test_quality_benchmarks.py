"""Benchmarks of quality: the engine's own voxels, members that explain them, and scores at their limits."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import models
import numpy as np
import pictures
import pytest
import segmentation
import tables
import torch
import xarray as xr
from lpips_offline import FILE, _Arrays, open_lpips
from PIL import Image
from predictions import Prediction, predict, read_labels, rounded, run_network, take_sections
from volumes import MODES, smooth_volume, write_weights

import emdiffuse_vol
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.models.checkpoints import save_weights
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.reconstruct.predictors import PlanePredictor

FACTOR = 5
SETTINGS = {"shard": (64, 64, 64), "tile": (24, 64, 64), "precision": "float32"}


@pytest.fixture(scope="module")
def sections() -> np.ndarray:
    return smooth_volume((8, 60, 80))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors"))


@pytest.fixture(scope="module")
def found(weights: str, sections: np.ndarray) -> Prediction:
    return run_network(weights, sections, FACTOR, **SETTINGS)


def test_predictions_are_the_voxels_of_the_engine(found: Prediction, weights: str, sections: np.ndarray) -> None:
    array = xr.DataArray(sections, dims=("z", "y", "x"))
    expected = emdiffuse_vol.isotropic(array, voxel_size=(50, 10, 10), weights=weights, mode=MODES[0], **SETTINGS)
    expected = expected.compute(scheduler="synchronous")
    np.testing.assert_array_equal(found.mean, expected["mean"].values)
    np.testing.assert_array_equal(found.uncertainty, expected["uncertainty"].values)


def test_the_uncertainty_is_the_spread_of_the_members(found: Prediction, sections: np.ndarray) -> None:
    """Untrained weights have no calibration: the scale is 1, and what differs is rounding to greys and eighths."""
    missing = np.arange(len(found.mean)) % FACTOR != 0
    spread = np.sqrt(np.square(found.members - found.mean.astype(np.float32)).mean(0))
    assert found.uncertainty is not None
    inside = missing[:, None, None] & (found.mean > 0) & (found.mean < 255) & (found.uncertainty < 31)
    # The mean is rounded to 1/2 grey, which adds at most that much to a root mean square.
    assert np.abs(spread - found.uncertainty)[inside].max() < 0.5 + 1 / 16 + 1e-3
    np.testing.assert_array_equal(
        found.members[:, ~missing], np.broadcast_to(sections, found.members[:, ~missing].shape)
    )
    assert len(found.members) == 4 and np.ptp(found.members[:, missing], axis=0).max() > 1


def test_members_of_blended_tiles_average_to_the_mean(tmp_path: Path, sections: np.ndarray) -> None:
    torch.manual_seed(0)
    path = tmp_path / "published.safetensors"
    save_weights(path, UNet(3, slices=True), architecture="unet-vem", config={}, modes=MODES, greys="dtype")
    roi = Box((3, 16, 20), (5, 60, 48))
    found = run_network(str(path), sections, 3, roi=str(roi), members=2, steps=1, tile=(1, 28, 28), block=(64, 64, 64))
    assert found.mean.shape == (4, 44, 28)
    missing = [1, 2]
    np.testing.assert_allclose(found.members[:, missing].mean(0).clip(0, 255), found.mean[missing], atol=0.51)
    assert found.facts["evaluations"] == 2


def test_all_methods_are_scored_on_the_subset_of_the_published_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "published.safetensors"
    save_weights(path, UNet(3, slices=True), architecture="unet-vem", config={}, modes=MODES, greys="dtype")
    stack = smooth_volume((13, 60, 60), seed=5)
    sections, truth, _ = take_sections(stack, 3)
    box = models.subset_box(sections, 3)
    assert box == Box((6, 16, 16), (10, 60, 60))
    whole = predict("linear", sections, 3)
    runs = {"one step": {"members": 2, "steps": 1, "tile": (1, 28, 28)}}
    found = models.run_subset(stack, 3, {"linear": whole.part(box)}, str(path), None, runs)
    assert list(found["methods"]) == ["linear", "one step"] and found["missing_planes"] == 2
    inside = whole.mean[7:9, 16:, 16:].astype(float) - truth[7:9, 16:, 16:]
    assert found["methods"]["linear"]["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean(inside**2)), abs=1e-3)
    assert 0 < found["methods"]["one step"]["psnr"] < 60 and "coverage_90" in found["methods"]["one step"]
    assert "seam" not in found["methods"]["one step"]  # too few planes for it


def test_the_subset_needs_one_tile_of_the_published_network() -> None:
    sections = np.zeros((32, 250, 250), np.uint8)
    box = models.subset_box(sections, 8)
    assert box.start[0] % 8 == 0 and box.shape == (9, 192, 192)
    margin = PlanePredictor.CORE[1] // 14
    for axis in (1, 2):
        assert (box.start[axis] - margin) // 224 == (box.stop[axis] + margin - 1) // 224 == 0


def test_a_perfect_prediction_has_perfect_scores() -> None:
    stack = smooth_volume((41, 64, 64), seed=1)
    sections, truth, missing = take_sections(stack, 4)
    reference = models.Reference(truth, np.flatnonzero(missing), 4, None, planes=5)
    assert len(reference.sample) == 5 and not set(reference.sample) & set(range(0, 41, 4))
    row = models.score(Prediction(truth, truth[None].astype(np.float32), facts={"cell": (8, 64, 64)}), reference)
    assert row["psnr"] == np.inf
    assert (row["ssim"], row["fsim"], row["crps"]) == pytest.approx((1, 1, 0))
    assert row["axial_resolution_nm"] == 20
    assert row["axial_power"] == pytest.approx(1)
    assert abs(row["seam"] - 1) < 4 * row["seam_error"]
    worse = models.score(predict("linear", sections, 4), reference)
    assert worse["fsim"] < 0.999 and worse["axial_resolution_nm"] > 20 and worse["axial_power"] < 0.7


def test_only_missing_planes_are_scored() -> None:
    sections, truth, missing = take_sections(smooth_volume((21, 40, 40), seed=2), 4)
    reference = models.Reference(truth, np.flatnonzero(missing), 4, None, planes=3)
    prediction = predict("cubic", sections, 4)
    before = models.score(prediction, reference)
    prediction.mean[~missing] = 0
    after = models.score(prediction, reference)
    for key in ("psnr", "ssim", "fsim", "crps"):
        assert before[key] == after[key]
    assert before["axial_resolution_nm"] != after["axial_resolution_nm"]  # of whole volumes, as stated


def test_a_brightness_step_between_tiles_is_a_seam() -> None:
    _, truth, _ = take_sections(smooth_volume((81, 48, 48), seed=3), 4)
    clean = models.seam_scores(truth, 4, 16)
    broken = models.seam_scores(truth + (np.arange(81) // 16 % 2 * 20)[:, None, None], 4, 16)
    assert abs(clean["seam"] - 1) < 4 * clean["seam_error"] < broken["seam"] - 1
    assert models.seam_scores(truth, 4, 96) == {}


def test_numbers_are_rounded_at_any_depth() -> None:
    assert rounded({"a": [np.float32(1.2345678), {"b": 1e9 / 3}], "c": (3, "x", None)}) == {
        "a": [1.2346, {"b": 333330000.0}],
        "c": [3, "x", None],
    }


def test_files_of_lpips_may_hold_arrays_only(tmp_path: Path) -> None:
    import io

    arrays = {"Conv_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    # As numpy wrote them when the file was made.
    old = pickle.dumps(arrays, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    np.testing.assert_array_equal(_Arrays(io.BytesIO(old)).load()["Conv_0"]["kernel"], arrays["Conv_0"]["kernel"])
    with pytest.raises(pickle.UnpicklingError, match="system"):
        _Arrays(io.BytesIO(pickle.dumps(os.system))).load()


def test_lpips_is_that_of_its_authors() -> None:
    """Package lpips 0.1.4, LPIPS(net="alex"), on the same two pairs. EMDVOL_LPIPS: the folder of lpips_offline.py."""
    folder = Path(os.environ.get("EMDVOL_LPIPS", ""))
    if not (folder / FILE).is_file():
        pytest.skip("EMDVOL_LPIPS does not name the folder of the networks of LPIPS")
    y, x = np.mgrid[:96, :120]
    board = 255.0 * ((x // 8 + y // 8) % 2)
    a = np.stack([127 + 100 * np.sin(x / 7) * np.cos(y / 5), board])
    b = np.stack([127 + 80 * np.sin((x + 2) / 7) * np.cos(y / 5), np.clip(board + 20 * np.sin(x / 3), 0, 255)])
    lpips = open_lpips(folder)
    found = lpips.distance(lpips.features(a), lpips.features(b))
    np.testing.assert_allclose(found, [0.012610797, 0.00059314288], rtol=1e-5)


def cells(n: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Greys and labels of eight cubic cells with dark walls three voxels thick."""
    side = np.arange(n) * 2 // n
    labels = 1 + 4 * side[:, None, None] + 2 * side[:, None] + side
    greys = np.full(labels.shape, 180.0)
    for axis in range(3):
        middle = np.abs(np.arange(n) - (n - 1) / 2) < 2
        greys[(slice(None),) * axis + (middle,)] = 60
    noise = np.random.default_rng(0).normal(0, 5, labels.shape)
    return np.clip(greys + noise, 0, 255).astype(np.uint8), labels


def test_walls_separate_cells_and_without_walls_there_is_one() -> None:
    greys, labels = cells()
    found = segmentation.agreement(labels, segmentation.segment(greys))
    assert found["segments"] == 8 and found["sum"] < 0.6  # walls themselves may go either way
    greys[20:28] = 180  # the wall between lower and upper cells
    assert segmentation.agreement(labels, segmentation.segment(greys))["merge"] > 0.8


def test_agreement_is_in_bits_and_tells_splits_from_merges() -> None:
    labels = np.repeat([1, 2], 32).reshape(4, 4, 4)
    assert segmentation.agreement(labels, np.ones_like(labels))["merge"] == pytest.approx(1)
    quarters = np.repeat([1, 2, 3, 4], 16).reshape(4, 4, 4)
    found = segmentation.agreement(labels, quarters)
    assert (found["split"], found["merge"]) == pytest.approx((1, 0))


def test_contacts_are_counted_face_by_face() -> None:
    labels = np.array([[[1, 1, 2], [3, 3, 2]]])
    height = np.array([[[0.1, 0.2, 0.9], [0.3, 0.4, 0.5]]])
    pairs, faces, total = segmentation.contacts(labels, height)
    found = {tuple(p): (n, round(s, 6)) for p, n, s in zip(pairs.tolist(), faces.tolist(), total.tolist(), strict=True)}
    # 1 | 2 across 0.2-0.9; 3 | 2 across 0.4-0.5; 1 | 3 across 0.1-0.3 and 0.2-0.4.
    assert found == {(1, 2): (1, 0.9), (2, 3): (1, 0.5), (1, 3): (2, 0.7)}


def test_merging_goes_from_the_weakest_contact_and_averages_by_area() -> None:
    pairs = np.array([[1, 2], [2, 3], [1, 3], [3, 4]])
    faces, total = np.array([10, 5, 15, 4]), np.array([1.0, 2.0, 9.0, 2.4])  # means 0.1, 0.4, 0.6, 0.6
    # 1 and 2 first; their contact with 3 is then (2 + 9) / 20 = 0.55, no longer the 0.4 of 2 alone.
    assert segmentation.merge_table(5, pairs, faces, total, 0.5).tolist() == [0, 1, 1, 3, 4]
    assert segmentation.merge_table(5, pairs, faces, total, 0.56).tolist() == [0, 1, 1, 1, 4]
    assert segmentation.merge_table(5, pairs, faces, total, 0.61).tolist() == [0, 1, 1, 1, 1]


def test_labels_are_supervoxels_put_together(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "t.h5", "w") as tables:
        tables["stack"] = np.array([[[0, 3], [5, 9]]], np.int32)
        tables["transforms"] = np.array([[0, 0], [3, 70], [5, 80], [9, 70], [4, 1]])
    (tmp_path / "groundtruth.h5.gz").write_bytes(gzip.compress((tmp_path / "t.h5").read_bytes()))
    assert read_labels(tmp_path).tolist() == [[[0, 70], [80, 70]]]


def test_pictures_are_small_and_their_pixels_whole(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stack = smooth_volume((61, 8, 250), seed=4)
    sections, truth, _ = take_sections(stack, 5)
    means = {"Linear interpolation": predict("linear", sections, 5).mean, "ours": truth}
    panels = pictures.xz_panels(truth, sections, 5, means, np.full(truth.shape, 3.0, np.float32), 4)
    assert [panel.title for panel in panels][:3] == ["Input", "Truth", "Linear interpolation"] and len(panels) == 6
    pictures.draw_xz(tmp_path / "xz.png", panels)
    page = Image.open(tmp_path / "xz.png")
    assert page.width == 3 * 500 + 4 * 16
    assert (tmp_path / "xz.png").stat().st_size < 400_000


def test_tables_are_made_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = {"psnr": 24.326, "ssim": 0.5978, "fsim": 0.81, "axial_resolution_nm": 79.3, "crps": 11.2}
    fast = linear | {"psnr": 25.9, "ssim": 0.68, "coverage_90": 0.901, "flop_per_voxel": 152880.0, "parameters": 817752}
    methods = {"linear": linear, "vemdiffuse-i-fast": fast}
    heading = {"machine": "a machine", "emdiffuse_vol": "1.2.3"}
    factors = [{"factor": 8, "missing_planes": 217, "methods": methods}]
    subset = {"factor": 8, "missing_planes": 7, "box": "120:129,16:208,16:208", "methods": methods}
    (tmp_path / "models.json").write_text(json.dumps(heading | {"factors": factors, "subset": subset}))
    inputs = {"ours": {"split": 1.0, "merge": 0.5, "sum": 1.5, "segments": 9, "gap_closed": 0.625}}
    (tmp_path / "segmentation.json").write_text(json.dumps({"inputs": inputs}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "| x8 | 24.33 / 0.598 | **25.90 / 0.680 (+1.57 dB)** |" in tables.isotropic()
    page = tables.filled("<!-- table:models:x8 -->\nold\n<!-- end -->")
    assert "| linear | 24.33 | 0.598 | 0.810 | 79 | 11.20 |  |  |  |" in page
    assert "| 90.1% | 817,752 | 1.5e+05 |" in page and "old" not in page and "217 missing planes" in page
    assert "LPIPS" not in page
    assert "7 missing planes of voxels 120:129" in tables.models_published()
    assert "| ours | 1.00 | 0.50 | 1.50 | 9 | 62% |" in tables.segmentation()
