"""What training reads and scores: masks of any shape, coarse planes, small inputs, settings beside flags."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from volumes import smooth_volume, write_volume, write_weights

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.config import load_training
from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.reconstruct.greys import GreyMap
from emdiffuse_vol.training import objectives
from emdiffuse_vol.training import sources as sources_module
from emdiffuse_vol.training import train as train_module
from emdiffuse_vol.training.augment import Augment
from emdiffuse_vol.training.calibrate import HeldOut, calibrate
from emdiffuse_vol.training.objectives import Sizes, SlabObjective, vem_objective
from emdiffuse_vol.training.sources import PairSource, VolumeSource, inside_mask, open_pair, open_source
from emdiffuse_vol.training.volumes import isotropic_volume


def test_a_coarser_mask_is_placed_in_nanometres(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "v.zarr", smooth_volume((16, 40, 64)), (10, 10, 10))
    coarse = np.random.default_rng(0).integers(0, 2, (4, 10, 13), np.uint8) * 255
    mask = write_volume(tmp_path / "m.zarr", coarse, (40, 40, 40))
    source, _ = open_source(VolumeSource(str(path), mask=str(mask)), "vEMDiffuse-i", 0.2)
    assert source.mask is not None
    # Centres of the first voxels coincide: a mask voxel reaches two voxels to either side.
    fine = np.zeros((16, 40, 64), np.float32)
    for z, y, x in np.ndindex(fine.shape):
        place = tuple(int(np.floor(p / 4 + 0.5)) for p in (z, y, x))
        if all(p < n for p, n in zip(place, coarse.shape, strict=True)):
            fine[z, y, x] = coarse[place] != 0
    for box in (Box.of(fine.shape), Box((3, 5, 7), (9, 38, 61)), Box((14, 38, 62), (16, 40, 64))):
        assert np.array_equal(inside_mask(source.mask, box), fine[box.slices()])
    assert np.array_equal(source.whole.known, fine[source.region.slices()])


def test_cubes_look_for_a_tenth_of_tissue_whatever_the_greys_of_the_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = np.zeros((40, 48, 64), np.uint8)
    inside[20:, :, :] = 255
    inside[:20, 0, 0] = 255  # hardly any
    path = write_volume(tmp_path / "v.zarr", smooth_volume(inside.shape), (10, 10, 10))
    mask = write_volume(tmp_path / "m.zarr", inside, (10, 10, 10))
    monkeypatch.setattr(sources_module, "CUBE", (8, 48, 48))
    source, _ = open_source(VolumeSource(str(path), mask=str(mask)), "vEMDiffuse-i", 0.2)
    assert all(source.cube(np.random.default_rng(seed)).known.mean() > 0.1 for seed in range(40))


def test_coarse_planes_keep_their_mask_and_use_every_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = np.ones((30, 40, 64), np.uint8)
    inside[:, :20] = 0
    path = write_volume(tmp_path / "v.zarr", smooth_volume(inside.shape), (50, 10, 10))
    mask = write_volume(tmp_path / "m.zarr", inside, (50, 10, 10))
    source, _ = open_source(VolumeSource(str(path), mask=str(mask)), "vEMDiffuse-a", 0.2, coarse=40)
    known = np.broadcast_to(source.whole.known, source.whole.greys.shape)
    assert known.shape[0] == 40 and not known[:, :20].any() and known[:, 20:].all()
    monkeypatch.setattr(sources_module, "CUBE", (16, 16, 16))
    source.coarse = 24
    assert source.cube(np.random.default_rng(0)).greys.shape == (24, 24, 24)


@pytest.mark.parametrize(
    ("shape", "voxel", "mode"), [((5, 40, 64), 10, "vEMDiffuse-i"), ((3, 40, 64), 20, "vEMDiffuse-a")]
)
def test_a_volume_too_shallow_for_a_crop_is_refused(tmp_path: Path, shape, voxel: int, mode: str) -> None:
    path = write_volume(tmp_path / "v.zarr", smooth_volume(shape), (voxel, 10, 10))
    with pytest.raises(ConfigError, match="5 planes of its lateral pixels deep; training needs at least 8"):
        open_source(VolumeSource(str(path)), mode, 0.2)


@pytest.mark.parametrize(
    ("weight", "held_out", "message"),
    [(1, 0.1, "too small to train on"), (1, 1.5, "held_out is 1.5"), (0, 0.4, "weight of .* is 0")],
)
def test_pairs_that_cannot_be_trained_on_are_refused(tmp_path: Path, weight, held_out: float, message: str) -> None:
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", smooth_volume((1, 40, 40))[0])
    with pytest.raises(ConfigError, match=message):
        open_pair(PairSource(str(tmp_path / "a.tif"), str(tmp_path / "a.tif"), weight), 1, held_out)


def test_what_was_not_measured_is_neither_scored_nor_calibrated_on(tmp_path: Path) -> None:
    greys = GreyMap(20.0, 230.0)
    volume = isotropic_volume(greys.normalise(smooth_volume((24, 32, 32))))
    unknown = replace(volume, known=np.zeros((1, 1, 1), np.float32))
    sizes = Sizes(1, 6, 16, (5,))
    assert len(SlabObjective(None, [volume], sizes, Augment()).scored()) == 3
    assert SlabObjective(None, [unknown], sizes, Augment()).scored() == []
    held = HeldOut(unknown, greys, "uint8")
    weights = str(write_weights(tmp_path / "w.safetensors"))
    assert calibrate(weights, [held], [held], (4,), tile=(44, 64, 64)).scale == {}


def test_the_published_blur_alone_blurs_for_the_published_network(monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole:
        def choose(self, rng, step):
            return isotropic_volume(smooth_volume((24, 32, 32)).astype(np.float32))

    seen = []
    monkeypatch.setattr(objectives, "augment", lambda rng, crop, chances: (seen.append(chances), crop)[1])
    objective = vem_objective(Whole(), [], Sizes(1, 6, 16, (5,)), Augment(blur=0.5, noise=0.25), False)
    objective.batch(np.random.default_rng(0), 0)
    assert seen == [Augment(blur=0, noise=0.25)]


@pytest.mark.parametrize("fit", [5, None, [1]])
def test_fit_that_is_no_object_is_refused_beside_flags_too(tmp_path: Path, fit) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"mode": "vEMDiffuse-i", "out": "x", "fit": fit}))
    with pytest.raises(ConfigError, match="setting 'fit'"):
        load_training(str(path), {"steps": 3})


@pytest.mark.parametrize(("rank", "said"), [("0", True), ("1", False)])
def test_of_several_processes_the_first_says_that_the_weights_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, said: bool
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"mode": "vEMDiffuse-i", "out": "x"}))
    monkeypatch.setattr(train_module, "train", lambda request, notify=None: Path("x/x.safetensors"))
    result = CliRunner().invoke(main, ["train", str(path)], env={"RANK": rank})
    assert result.exit_code == 0 and ("is complete" in result.output) == said
