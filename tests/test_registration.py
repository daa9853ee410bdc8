"""Registration: known warps of real EM are found, what cannot be registered is refused, results can be trained on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner
from scipy import ndimage
from skimage.io import imread
from volumes import read, smooth_volume, write_volume

from emdiffuse_vol.alignment.pairs import open_pair_to_register, register_pair
from emdiffuse_vol.alignment.stacks import align_stack
from emdiffuse_vol.alignment.stored import Plane
from emdiffuse_vol.cli.main import main
from emdiffuse_vol.errors import ConfigError, GeometryError
from emdiffuse_vol.registration import pairs
from emdiffuse_vol.registration.drift import corrections
from emdiffuse_vol.registration.features import fit_phases
from emdiffuse_vol.registration.flow import choose_flow, raft_flow
from emdiffuse_vol.registration.pairs import Binned, Settings, overview, refine, register, tiles
from emdiffuse_vol.registration.warps import Warp, covered, places_of, transformed
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.training.sources import PairSource, open_pair

SIDE, MARGIN = 176, 28  # of fixed images, inside moving ones


def turned(degrees: float, stretch: float, shift: tuple[float, float]) -> np.ndarray:
    """About the middle of an image, [3, 3]."""
    a, middle = np.deg2rad(degrees), np.eye(3)
    middle[:2, 2] = (SIDE - 1) / 2
    matrix = np.array(
        [[np.cos(a) * stretch, -np.sin(a), shift[0]], [np.sin(a), np.cos(a) / stretch, shift[1]], [0, 0, 1]]
    )
    return middle @ matrix @ np.linalg.inv(middle)


def elastic(seed: int, most: float = 8.0) -> np.ndarray:
    """A smooth displacement [2, y, x] whose longest is ``most`` pixels."""
    rng = np.random.default_rng(seed)
    field = np.stack([ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), 30) for _ in range(2)])
    return most * field / np.hypot(*field).max()


def dwell(rng: np.random.Generator, greys: np.ndarray, counts: float) -> np.ndarray:
    """Poisson noise of ``counts`` per grey level, and a detector's."""
    return rng.poisson(np.clip(greys, 0, None) * counts) / counts + rng.normal(0, 3, greys.shape)


@pytest.mark.parametrize(
    ("matrix", "bend"),
    [(turned(7, 1, (6, -9)), 0), (turned(2, 1.04, (-4, 5)), 0), (np.eye(3), 8)],
    ids=["rigid", "affine", "elastic"],
)
def test_known_warps_are_found_through_the_noise_of_another_dwell_time(data: Path, matrix, bend: float) -> None:
    rng = np.random.default_rng(0)
    truth = imread(data / "fib25_train/grayscale_maps/iso.2650.png").astype(float)
    warped = transformed(matrix, places_of((SIDE, SIDE)) + elastic(1, bend)) + MARGIN
    fixed = dwell(rng, ndimage.map_coordinates(truth, warped, order=3, mode="reflect"), 1)
    found = register(fixed, dwell(rng, truth, 0.25), Settings(), choose_flow("ilk"))
    assert not found.failures
    error = np.hypot(*(found.warp(places_of((SIDE, SIDE))) - warped))
    assert np.median(error) <= 0.3 and np.percentile(error, 95) <= 1


def test_confidence_falls_where_the_images_differ() -> None:
    greys = smooth_volume((1, 128, 128))[0].astype(np.float32)
    other = greys.copy()
    other[40:88, 40:88] = smooth_volume((1, 48, 48), seed=1)[0]
    confidence = register(greys, other, Settings("translation", "correlation"), choose_flow("ilk")).confidence
    assert np.median(confidence[6:10, 6:10]) < 0.3
    assert confidence[:3].min() > 0.5 and confidence[:, -3:].min() > 0.5


def test_flow_in_tiles_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = smooth_volume((1, 96, 280))[0].astype(np.float32)
    y, x = places_of(fixed.shape)
    moving = ndimage.map_coordinates(fixed, [y + np.sin(x / 30), x + np.cos(y / 30)], order=3, mode="nearest")
    warp, flow = Warp.rigid(np.eye(3), fixed.shape), choose_flow("ilk")
    whole, _ = refine(fixed, moving, warp, flow)
    monkeypatch.setattr(pairs, "TILE", 96)
    monkeypatch.setattr(pairs, "HALO", 48)
    assert len(list(tiles(fixed.shape))) == 3
    parts, _ = refine(fixed, moving, warp, flow)
    assert np.percentile(np.hypot(*(whole.bend - parts.bend)), 99) < 0.1


def test_a_warp_means_the_same_on_more_pixels() -> None:
    rng = np.random.default_rng(0)
    bend = ndimage.gaussian_filter(rng.standard_normal((2, 20, 20)), (0, 3, 3)).astype(np.float32) * 10
    warp = Warp(turned(3, 1.02, (2, 5)), bend)
    large = warp.enlarged(3, (480, 480))
    inner = places_of((150, 150))[:, 8:-8:7, 8:-8:7]
    assert np.allclose(large(3 * inner + 1), 3 * warp(inner) + 1, atol=0.1)


def test_an_overview_is_of_means_and_read_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).random((50, 31))
    expected = image[:48, :30].reshape(16, 3, 10, 3).mean(axis=(1, 3))
    monkeypatch.setattr(pairs, "BAND", 200)
    assert np.allclose(overview(image, 3), expected)
    assert np.allclose(Binned(image, 3)[2:5, 4:9], expected[2:5, 4:9])


def test_large_images_are_registered_from_their_overviews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "OVERVIEW", 120)
    moving = smooth_volume((1, SIDE + 2 * MARGIN, SIDE + 2 * MARGIN))[0].astype(np.float32)
    places = transformed(turned(4, 1, (3, -5)), places_of((SIDE, SIDE))) + MARGIN
    fixed = ndimage.map_coordinates(moving, places, order=3)
    found = register(fixed, moving, Settings("rigid", flow="none"), None)
    assert np.hypot(*(found.warp(places_of((SIDE, SIDE))) - places)).max() < 0.5 and not found.failures


def test_cells_that_reach_outside_are_not_covered() -> None:
    shift = np.eye(3)
    shift[:2, 2] = -9.5, 0
    found = covered(shift, (36, 40), (30, 40))
    assert found.shape == (5, 5) and found[2:4].all() and found[4].all() and not found[:2].any()
    shift[:2, 2] = 0, 0.75
    assert covered(shift, (16, 16), (16, 16)).tolist() == [[True, False]] * 2


def test_phases_find_a_shift_to_a_tenth() -> None:
    rng = np.random.default_rng(0)
    greys = ndimage.gaussian_filter(rng.standard_normal((160, 160)), 2)
    moved = ndimage.shift(greys, (5.3, -7.8), order=3, mode="reflect")
    assert np.allclose(fit_phases(greys, moved)[:2, 2], (5.3, -7.8), atol=0.11)


def test_drift_is_taken_away_and_slants_and_errors_stay_bounded() -> None:
    rng, shape = np.random.default_rng(0), (100, 100)
    steps = np.tile(np.eye(3), (400, 1, 1))
    steps[1:, :2, 2] = (0.5, -0.2)  # a slant
    jumps = np.zeros((400, 2))
    jumps[1:] = rng.normal(0, 0.1, (399, 2))
    steps[:, :2, 2] += jumps
    moved = corrections(steps, 10, shape)[:, :2, 2]
    assert np.abs(moved[40:-40]).max() < 2  # of 200 pixels from end to end
    # Short against the window: all of it goes, but for the mean.
    short = corrections(steps[:5], 50, shape)[:, :2, 2]
    assert np.allclose(np.diff(short, axis=0), steps[1:5, :2, 2], atol=0.02)


def write_pair(folder: Path, depth: int = 1) -> tuple[Path, Path]:
    """A fixed volume, and a moving one with pixels twice as large, shifted by (3, -4) of them."""
    greys = smooth_volume((depth, 200, 200))
    fixed = write_volume(folder / "fixed.zarr", greys, (30, 4, 4))
    coarse = greys[:, 12:-12, 4:-20].reshape(depth, 88, 2, 88, 2).mean(axis=(2, 4)).astype(np.uint8)
    return write_volume(folder / "moving.zarr", coarse, (30, 8, 8)), fixed


def test_stacks_are_registered_section_by_section_and_failed_ones_are_left_empty(tmp_path: Path) -> None:
    path, fixed = write_pair(tmp_path, 2)
    other = read(path)
    other[1] = smooth_volume((1, 88, 88), seed=5)[0]
    moving = write_volume(tmp_path / "half.zarr", other, (30, 8, 8))
    out, arguments = tmp_path / "pair.zarr", ["--transform", "rigid", "--flow", "none"]
    command = ["register", str(moving), str(fixed), "--out", str(out), *arguments]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1 and "1 of 2 sections failed, the first of them section 1: agreeing" in refused.output
    assert "at least 12 needed" in refused.output and not list(tmp_path.glob("*pair*"))

    made = CliRunner().invoke(main, [*command, "--skip-failed", "--picture", str(tmp_path / "p.png")])
    assert made.exit_code == 0, made.output
    assert "left empty: section 1" in made.output and imread(tmp_path / "p.png").shape[1] == 1400
    image, confidence = open_volume(out), open_volume(out / "confidence")
    assert image.spec.shape == (2, 100, 100) and image.spec.voxel_size == (30, 8, 8)
    assert image.spec.origin == (0, 2, 2) and confidence.spec.origin == (0, 30, 30)
    greys, trust = read(out), read(out / "confidence")
    pair, held = open_pair(PairSource(str(out), str(fixed)), 2, 0.2)
    assert pair.target.shape[1] == 2 * pair.condition.shape[1] and held.trusted is not None
    places = [pair.place(np.random.default_rng(seed), 48) for seed in range(8)]
    assert all(pair.trusted[z, y : y + 48, x : x + 48].all() for z, y, x in places)
    assert np.corrcoef(pair.condition[0].ravel(), pair.target[0, ::2, ::2].ravel())[0, 1] > 0.95
    truth = read(fixed)[0].reshape(100, 2, 100, 2).mean(axis=(1, 3))
    assert np.abs(greys[0, 7:93, 3:89].astype(float) - truth[7:93, 3:89]).mean() < 2
    assert not greys[0, :5].any() and not trust[0, 0].any()  # nothing of the moving image lies there
    assert trust[0, 2:10, 2:10].min() > 200
    assert not greys[1].any() and not trust[1].any()


def test_an_output_is_kept_when_another_pair_is_refused(tmp_path: Path) -> None:
    moving, fixed = write_pair(tmp_path)
    before = read(moving)
    other = write_volume(tmp_path / "other.zarr", smooth_volume((1, 88, 88), seed=9), (30, 8, 8))
    command = ["register", str(other), str(fixed), "--out", str(moving), "--overwrite"]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1 and "agreeing" in refused.output and np.array_equal(read(moving), before)


def test_a_registration_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moving, fixed, factor = open_pair_to_register(*map(str, write_pair(tmp_path, 3)))
    settings = Settings("translation", flow="none")
    register_pair(moving, fixed, factor, tmp_path / "whole.zarr", settings)

    def killed(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        register_pair(moving, fixed, factor, tmp_path / "part.zarr", settings, progress=killed)
    assert not (tmp_path / "part.zarr").exists()
    seen: list[int] = []
    monkeypatch.setattr(Plane, "shape", property(lambda plane: (seen.append(plane.z), plane.volume.spec.shape[1:])[1]))
    records = register_pair(moving, fixed, factor, tmp_path / "part.zarr", settings)
    assert seen[0] == 2 and len(records) == 3
    for name in ("", "confidence"):
        assert np.array_equal(read(tmp_path / "part.zarr" / name), read(tmp_path / "whole.zarr" / name))
    log = "sections.jsonl"
    assert (tmp_path / "part.zarr" / log).read_text() == (tmp_path / "whole.zarr" / log).read_text()


def test_a_stack_loses_its_jitter(tmp_path: Path) -> None:
    section = smooth_volume((1, 200, 200))[0]
    shifts = [(0, 0), (4, -3), (-2, 5), (3, 3)]
    stack = np.stack([section[20 + y : 180 + y, 20 + x : 180 + x] for y, x in shifts])
    volume = open_volume(write_volume(tmp_path / "s.zarr", stack, (10, 10, 10)))
    align_stack(volume, tmp_path / "a.zarr", "translation")
    aligned = read(tmp_path / "a.zarr").astype(float)
    inner = aligned[:, 10:-10, 10:-10]
    assert np.abs(inner - inner[0]).mean() < 1.5 and np.abs(stack - stack[0].astype(float)).mean() > 10
    trust = read(tmp_path / "a.zarr/confidence")
    assert set(np.unique(trust)) == {0, 255} and trust[:, 2:-2, 2:-2].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--transform", "twisted"], "transform 'twisted' is unknown; choose one of translation, rigid"),
        (["--by", "correlation"], "correlation finds a translation, not affine"),
        (["--flow-weights", "w.pth"], "flow ilk takes no weights"),
        (["--stack"], "give MOVING and FIXED, or one stack with --stack"),
        (["--factor", "3", "--window", "3"], "--window is of --stack"),
    ],
)
def test_settings_that_say_nothing_end_in_one_line(tmp_path: Path, arguments, message: str) -> None:
    moving, fixed = write_pair(tmp_path)
    out = tmp_path / "p.zarr"
    found = CliRunner().invoke(main, ["register", str(moving), str(fixed), "--out", str(out), *arguments])
    assert found.exit_code == 1 and message in found.output and not out.exists()


def test_a_stack_of_sections_that_have_nothing_in_common_is_refused(tmp_path: Path) -> None:
    stack = np.concatenate([smooth_volume((1, 90, 90), seed) for seed in (0, 0, 1)])
    path, out = str(write_volume(tmp_path / "s.zarr", stack, (10, 10, 10))), tmp_path / "a.zarr"
    refused = CliRunner().invoke(main, ["register", path, "--stack", "--out", str(out)])
    assert refused.exit_code == 1 and not list(tmp_path.glob("*a.zarr*"))
    assert "cannot be aligned: 1 of 3 sections failed, the first of them section 2: agreeing" in refused.output
    nonsense = CliRunner().invoke(main, ["register", path, "--stack", "--out", str(out), "--window", "0"])
    assert nonsense.exit_code == 1 and "window is 0 sections" in nonsense.output


def test_volumes_that_cannot_be_a_pair_are_refused(tmp_path: Path) -> None:
    moving, fixed = (str(path) for path in write_pair(tmp_path))
    with pytest.raises(GeometryError, match=r"is 0.5 pixels of .*; register the finer one as FIXED"):
        open_pair_to_register(fixed, moving)
    deep = write_volume(tmp_path / "deep.zarr", smooth_volume((2, 40, 40)), (30, 8, 8))
    with pytest.raises(GeometryError, match=r"has 2 sections and .* has 1; expected the same"):
        open_pair_to_register(str(deep), fixed)
    tifffile.imwrite(tmp_path / "m.tif", smooth_volume((1, 40, 40))[0])
    assert open_pair_to_register(str(tmp_path / "m.tif"), fixed, factor=2)[2] == 2


def test_flow_of_raft_is_said_y_before_x_for_images_of_any_size() -> None:
    class Network(torch.nn.Module):
        """Takes what RAFT takes, and says what RAFT says of a shift by (y, x) = (2, -3)."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, fixed, moving, num_flow_updates):
            assert fixed.shape == (1, 3, 128, 136) and fixed.abs().max() <= 1
            return [torch.stack([torch.full(fixed.shape[2:], v) for v in (-3.0, 2.0)])[None]] * num_flow_updates

    image = np.random.default_rng(0).standard_normal((90, 130)).astype(np.float32)
    found = raft_flow(Network(), image, image)
    assert found.shape == (2, 90, 130) and (found[0] == 2).all() and (found[1] == -3).all()


def test_raft_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ConfigError, match=r"pip install 'emdiffuse_vol\[raft\]'"):
        choose_flow("raft")
