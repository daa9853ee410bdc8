"""Training: what is hidden, what is optimised, and that a resumed run is an unbroken one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from volumes import smooth_volume, write_volume, write_weights

from emdiffuse_vol.errors import BlockError, ConfigError, InputError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.models.checkpoints import load_weights
from emdiffuse_vol.models.slab import SlabNet
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.reconstruct.device import Device
from emdiffuse_vol.reconstruct.greys import GreyMap, measure_greys
from emdiffuse_vol.training import sources as sources_module
from emdiffuse_vol.training.augment import CHANGES, Augment, augment, bend_contrast
from emdiffuse_vol.training.calibrate import HeldOut, calibrate, residuals
from emdiffuse_vol.training.crops import cut_crop, random_crop
from emdiffuse_vol.training.fit import FitSettings, Run, fit, learning_rate
from emdiffuse_vol.training.muon import Muon, orthogonal
from emdiffuse_vol.training.objectives import Sizes, SlabObjective, batch_tensors, draw_gammas
from emdiffuse_vol.training.sources import Cubes, PairSource, VolumeSource, open_pair, open_source
from emdiffuse_vol.training.train import Request, train
from emdiffuse_vol.training.volumes import isotropic_volume, lateral_volume, predict_volume, refill

GREYS = smooth_volume((40, 40, 40)).astype(np.float32) / 128 - 1
VOLUME = isotropic_volume(GREYS)
CPU = Device("cpu", "float32")
QUICK = FitSettings(steps=6, warmup=2, members_from=0.5, checkpoint_every=2, validate_every=100)


class Whole:
    """One volume in memory, as ``Cubes`` would give it."""

    def __init__(self, volume=VOLUME) -> None:
        self.volume, self.lacking = volume, volume.axes != (0, 1, 2)

    def choose(self, rng, step):
        return self.volume

    def set_refill(self, fill) -> None:
        self.volume = fill(self.volume, 5)


def small_objective(volume=VOLUME, batch: int = 1) -> SlabObjective:
    sizes = Sizes(batch, 6, 16, (2, 3))
    return SlabObjective(Whole(volume), [isotropic_volume(GREYS[:16, :16, :16])], sizes, Augment())


def small_net() -> SlabNet:
    torch.manual_seed(0)
    return SlabNet(8, 8, 1)


def small_run(folder: Path, settings: FitSettings = QUICK, **kwargs) -> Run:
    return Run(small_net(), small_objective(**kwargs), settings, folder, CPU)


# What is hidden


def test_crops_hide_planes_between_sections_and_keep_their_places() -> None:
    crop = cut_crop(VOLUME, 4, 8, 3, slice(0, 16), slice(4, 20))
    features, truth, t, hidden, _ = batch_tensors([crop])
    assert truth.shape == (1, 1, 13, 16, 16)
    assert torch.equal(truth[0, 0], torch.from_numpy(GREYS[8:21, :16, 4:20]))
    assert torch.equal(features[0, 1, ~hidden], truth[0, 0, ~hidden])  # nearest section below, at a section
    below = torch.from_numpy(GREYS[8:20:4, :16, 4:20]).repeat_interleave(4, 0)
    assert torch.equal(features[0, 1, :12], below)
    assert torch.equal(features[0, 4, :4], torch.from_numpy(GREYS[[16] * 4, :16, 4:20]))
    assert t.tolist() == [0, 0.25, 0.5, 0.75] * 3 + [0]


def test_context_beyond_the_ends_is_mirrored_in_sections() -> None:
    crop = cut_crop(VOLUME, 10, 0, 3, slice(0, 8), slice(0, 8))
    assert np.array_equal(crop.sections[0], GREYS[10, :8, :8])  # section -1 is section 1
    assert np.array_equal(crop.sections[-2], GREYS[20, :8, :8])  # sections 0..3; 4 is 2, 5 is 1
    assert np.array_equal(crop.sections[-1], GREYS[10, :8, :8])


def test_thick_sections_are_means_of_planes() -> None:
    crop = cut_crop(VOLUME, 5, 10, 2, slice(0, 8), slice(0, 8), thickness=3)
    assert np.allclose(crop.sections[1], GREYS[9:12, :8, :8].mean(0))
    assert np.array_equal(crop.truth[0], GREYS[10, :8, :8])


def test_crops_come_from_all_places_and_orientations() -> None:
    ramp = isotropic_volume(np.arange(40, dtype=np.float32)[:, None, None] * np.ones((1, 40, 40), np.float32))
    axes = set()
    for seed in range(40):
        crop = random_crop(np.random.default_rng(seed), ramp, 3, 6, 16)
        slopes = [float(np.diff(crop.truth, axis=axis).mean()) for axis in range(3)]
        axes.add((int(np.argmax(np.abs(slopes))), slopes[int(np.argmax(np.abs(slopes)))] > 0))
    assert len(axes) == 6


def test_an_anisotropic_stack_hides_planes_along_y_and_x_only_and_scores_measured_rows_only() -> None:
    sections = smooth_volume((9, 48, 48)).astype(np.float32)
    volume = lateral_volume(sections, 5)
    assert np.array_equal(volume.greys[::5], sections) and volume.known.ravel()[::5].all()
    assert volume.known.sum() == 9
    for seed in range(30):
        crop = random_crop(np.random.default_rng(seed), volume, 4, 12, 24)
        rows = crop.known.reshape(len(crop.known), -1)
        assert (rows == rows[0]).all()  # whole hidden planes hold measured rows, none is unknown as a whole
        shares = [crop.known.mean(axis=(0, 2)), crop.known.mean(axis=(0, 1))]
        assert any(set(np.unique(share)) == {0, 1} for share in shares)  # the unknown lie along one lateral axis


def test_unknown_voxels_do_not_enter_the_loss() -> None:
    volume = lateral_volume(smooth_volume((9, 48, 48)).astype(np.float32) / 128 - 1, 5)
    crop = random_crop(np.random.default_rng(1), volume, 4, 12, 24)
    spoilt = replace(crop, truth=np.where(crop.known > 0, crop.truth, 100).astype(np.float32))
    objective, generator = small_objective(), torch.Generator()
    losses = [objective.loss(small_net(), [c], generator.manual_seed(0), True)[0].item() for c in (crop, spoilt)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    changed = replace(crop, truth=np.where(crop.known > 0, 100, crop.truth).astype(np.float32))
    assert objective.loss(small_net(), [changed], generator.manual_seed(0), True)[0].item() != pytest.approx(losses[0])


def test_refilling_keeps_measured_sections_and_follows_the_network() -> None:
    volume = lateral_volume(smooth_volume((5, 30, 36)).astype(np.float32) / 128 - 1, 4)
    filled = refill(small_net().eval(), volume, 4, torch.Generator().manual_seed(0))
    assert np.array_equal(filled.greys[::4], volume.greys[::4])
    assert not np.array_equal(filled.greys, volume.greys)
    untrained, _ = predict_volume(small_net().eval(), volume.greys[::4], 4)
    assert np.allclose(untrained, volume.greys, atol=1e-6)  # a new network's mean is linear interpolation


def test_prediction_in_memory_is_that_of_the_engine(tmp_path: Path) -> None:
    import xarray as xr

    from emdiffuse_vol.reconstruct.lazy import isotropic

    sections = smooth_volume((9, 40, 44), dtype="float32")
    weights = write_weights(tmp_path / "w.safetensors")
    made = isotropic(
        xr.DataArray(sections, dims=("z", "y", "x")),
        voxel_size=(5.0, 1.0, 1.0),
        weights=str(weights),
        tile=(44, 64, 64),
    ).compute(scheduler="synchronous")
    greys, _ = measure_greys(sections.shape, lambda box: sections[box.slices()])
    mean, _ = predict_volume(load_weights(str(weights)).net, greys.normalise(sections), 5)
    hidden = np.arange(41) % 5 != 0  # the engine copies measured planes
    assert np.abs(greys.restore(mean) - made["mean"].values)[hidden].max() < 0.01


# Augmentation


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_happens_alone_and_spares_the_truth_where_it_should(name: str) -> None:
    crop = cut_crop(VOLUME, 4, 8, 3, slice(0, 16), slice(4, 20))
    chances = replace(Augment(0, 0), **{name: 1.0})
    changed = augment(np.random.default_rng(5), crop, chances)
    assert not np.array_equal(changed.sections, crop.sections)
    assert np.array_equal(changed.truth, crop.truth) == (name not in ("greys", "contrast"))
    assert changed.sections.dtype == changed.truth.dtype == np.float32
    untouched = augment(np.random.default_rng(5), crop, Augment(0, 0))
    assert untouched is crop


def test_contrast_keeps_the_order_of_greys() -> None:
    crop = cut_crop(VOLUME, 4, 8, 3, slice(0, 16), slice(4, 20))
    ramp = replace(crop, truth=np.linspace(-4, 4, 1000, dtype=np.float32))
    for seed in range(10):
        assert (np.diff(bend_contrast(np.random.default_rng(seed), ramp).truth) > 0).all()


# The loop


def test_a_resumed_run_continues_the_same_loss_curve_bit_for_bit(tmp_path: Path) -> None:
    unbroken = small_run(tmp_path / "a")
    fit(unbroken)
    for stop in (3, 4, 6):  # step 3 comes after the checkpoint at 2 and is made twice
        broken = small_run(tmp_path / "b")
        while broken.step < stop:
            broken.advance()
            if broken.step % 2 == 0:
                broken.save()
    curves = []
    for folder in ("a", "b"):
        rows = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        curves.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    assert curves[0] == curves[1] and [row["step"] for row in curves[0]] == [1, 2, 3, 4, 5, 6]
    for first, second in ((unbroken.net, broken.net), (unbroken.ema, broken.ema)):
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_resumed_run_sees_the_rows_its_teacher_filled(tmp_path: Path) -> None:
    settings = replace(QUICK, refill=(0.5,))
    volume = lateral_volume(smooth_volume((9, 32, 32)).astype(np.float32) / 128 - 1, 5)
    unbroken = small_run(tmp_path / "a", settings, volume=volume)
    fit(unbroken)
    assert unbroken.teacher is not None
    for stop in (5, 6):
        broken = small_run(tmp_path / "b", settings, volume=volume)
        while broken.step < stop:
            broken.advance()
            if broken.step == 4:
                broken.save()
    assert all(torch.equal(a, b) for a, b in zip(unbroken.net.parameters(), broken.net.parameters(), strict=True))


def test_dropout_is_the_same_after_a_resume(tmp_path: Path) -> None:
    class Dropping:
        lacking = False

        def batch(self, rng, step):
            return torch.ones(1, 64)

        def loss(self, net, batch, generator, stochastic):
            loss = net(batch).square().mean()
            return loss, {"loss": loss.item()}

    def run(folder: Path) -> Run:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(64, 4))
        return Run(net, Dropping(), QUICK, folder, CPU)

    unbroken, broken = run(tmp_path / "a"), run(tmp_path / "b")
    rows = [unbroken.advance() for _ in range(2)]
    broken.advance()
    broken.save()
    torch.manual_seed(7)  # another process
    assert run(tmp_path / "b").advance()["loss"] == rows[1]["loss"]


def test_other_settings_do_not_continue_a_run(tmp_path: Path) -> None:
    fit(small_run(tmp_path))
    with pytest.raises(ConfigError, match=r"fit.learning_rate was 0.0015, is now 0.1; .*another --out"):
        small_run(tmp_path, replace(QUICK, learning_rate=0.1))


@pytest.mark.parametrize(
    "settings", [{"batch": 3}, {"factors": [2]}, {"network": {"architecture": "slab", "width": 4}}]
)
def test_another_recipe_does_not_continue_a_run(tmp_path: Path, settings) -> None:
    path = write_volume(tmp_path / "v.zarr", smooth_volume((16, 40, 40)), (10, 10, 10))
    fixed = {"volumes": [{"path": str(path)}], "held_out": 0.3}
    train(load(small_config(tmp_path, **fixed)))
    (name,) = settings
    with pytest.raises(ConfigError, match=f"made with other settings: {name} was"):
        train(load(small_config(tmp_path, **fixed, **settings)))
    train(load(small_config(tmp_path, **fixed, data="Other words.")))


def test_rows_of_logs_are_neither_doubled_nor_torn_after_a_kill(tmp_path: Path) -> None:
    settings = replace(QUICK, steps=4, checkpoint_every=3, validate_every=2)
    run = small_run(tmp_path, settings)
    while run.step < 3:
        run.advance()
        if run.step == 2:
            run.score()
    run.save()
    run.advance()
    run.score()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "ra')
    fit(small_run(tmp_path, settings))
    for name, steps in (("log", [1, 2, 3, 4]), ("scores", [2, 4])):
        rows = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == steps


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    run.advance()
    run.save()
    run.objective.cubes.volume = isotropic_volume(np.full_like(GREYS, np.nan))
    with pytest.raises(BlockError, match="gradient is not finite at step 1"):
        run.advance()
    assert small_run(tmp_path).step == 1


def test_learning_lowers_the_error_below_linear_interpolation(tmp_path: Path) -> None:
    rows = []
    settings = replace(QUICK, steps=60, learning_rate=3e-3, members_from=1.0)
    fit(small_run(tmp_path, settings, batch=2), lambda run, row: rows.append(row))
    assert np.mean([row["mse"] for row in rows[-15:]]) < 0.9


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    run = small_run(tmp_path, replace(QUICK, ema=0.5))
    before = [p.clone() for p in run.ema.parameters()]
    run.advance()
    decay = min(0.5, 2 / 11)
    for old, new, average in zip(before, run.net.parameters(), run.ema.parameters(), strict=True):
        assert torch.allclose(average, decay * old + (1 - decay) * new, atol=1e-6)


def test_a_time_budget_becomes_a_number_of_steps(tmp_path: Path) -> None:
    run = small_run(tmp_path, replace(QUICK, minutes=0.02))
    while run.step < 25:
        run.advance()
    each = run.seconds / 25
    assert run.steps >= 26 and run.steps * each < 3 * max(1.2, 26 * each)
    run.save()
    assert small_run(tmp_path, replace(QUICK, minutes=0.02)).steps == run.steps


def test_a_time_budget_is_timed_alike_when_it_is_interrupted_and_spent_whole(tmp_path: Path) -> None:
    """A step takes 1 s, the first five 3 s. Where the spread is trained from the start, later steps cost no more."""
    for members_from, dearer in ((0.0, 1.0), (0.5, 1.25)):
        settings = replace(QUICK, minutes=10, members_from=members_from)
        folder = tmp_path / str(members_from)
        run = small_run(folder, settings)
        for step in range(1, 26):
            run.step, run.seconds = step, run.seconds + (3 if step <= 5 else 1)
            run._budget()
            if step == 20:
                run.save()
                run = small_run(folder, settings)
                assert not run.finished
        assert run.steps == int(600 / dearer)


def test_learning_rate_rises_stays_and_falls() -> None:
    settings = FitSettings(warmup=100, decay=0.2, learning_rate=1.0)
    assert learning_rate(49, settings, 1000) == 0.5
    assert learning_rate(500, settings, 1000) == 1.0
    assert learning_rate(900, settings, 1000) == pytest.approx(0.5)
    assert learning_rate(999, settings, 1000) == pytest.approx(0.005)
    cosine = replace(settings, schedule="cosine", warmup=1)
    assert learning_rate(500, cosine, 1000) == pytest.approx(0.5)
    assert learning_rate(1000, cosine, 1000) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (16, 16)])
def test_orthogonal_keeps_directions_and_evens_their_strength(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(orthogonal(matrix), full_matrices=False)
    assert s.min() > 0.5 and s.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity((left @ right).flatten(), (u @ v).flatten(), 0) > 0.99


def test_muon_minimises() -> None:
    target = torch.randn(8, 4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    weight = torch.nn.Parameter(torch.zeros_like(target))
    optimizer = Muon([weight], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (weight - target).square().mean().backward()
        optimizer.step()
    assert (weight - target).square().mean() < 0.05 * target.square().mean()


def test_noise_levels_are_drawn_as_published() -> None:
    gammas = draw_gammas(20000, torch.Generator().manual_seed(0))
    assert gammas.min() > 4.3e-5 and gammas.max() < 0.999999
    from emdiffuse_vol.diffusion.schedules import published_train

    middle = published_train().gammas[1000]
    assert (gammas > middle).float().mean() == pytest.approx(0.5, abs=0.02)


# Sources


def test_nothing_that_is_held_out_is_read_for_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_volume(tmp_path / "v.zarr", smooth_volume((40, 48, 64)), (10, 10, 10))
    source, held = open_source(VolumeSource(str(path), roi="0:40,0:48,4:64"), "vEMDiffuse-i", 0.2)
    assert source.region == Box((0, 0, 4), (40, 48, 52)) and held.region == Box((0, 0, 52), (40, 48, 64))
    monkeypatch.setattr(sources_module, "IN_MEMORY", 1000)
    monkeypatch.setattr(sources_module, "CUBE", (24, 24, 24))
    read = []
    monkeypatch.setattr(source.volume, "read", lambda box, real=source.volume.read: (read.append(box), real(box))[1])
    cubes = Cubes([source], seed=0)
    for step in range(0, 4000, 100):
        cubes.choose(np.random.default_rng(step), step)
    assert len({box.start for box in read}) > 10
    assert all(box in source.region for box in read)


def test_cubes_follow_from_the_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_volume(tmp_path / "v.zarr", smooth_volume((40, 48, 64)), (10, 10, 10))
    monkeypatch.setattr(sources_module, "IN_MEMORY", 1000)
    monkeypatch.setattr(sources_module, "CUBE", (24, 24, 24))

    def seen(first: int) -> list[float]:
        source, _ = open_source(VolumeSource(str(path)), "vEMDiffuse-i", 0.2)
        cubes = Cubes([source], seed=0)
        return [float(cubes.choose(np.random.default_rng(s), s).greys.sum()) for s in range(first, 1200, 40)]

    assert seen(0)[20:] == seen(800)


def test_masked_voxels_are_not_trained_on(tmp_path: Path) -> None:
    greys = smooth_volume((30, 40, 64))
    inside = np.zeros_like(greys)
    inside[:, :20] = 1
    path = write_volume(tmp_path / "v.zarr", greys, (10, 10, 10))
    mask = write_volume(tmp_path / "m.zarr", inside, (10, 10, 10))
    source, _ = open_source(VolumeSource(str(path), mask=str(mask)), "vEMDiffuse-i", 0.2)
    assert source.whole.known[:, :20].all() and not source.whole.known[:, 20:].any()
    crops = [random_crop(np.random.default_rng(s), source.whole, 3, 6, 16) for s in range(20)]
    assert all(crop.known[crop.hidden].any() for crop in crops)


def test_damaged_sections_are_bridged_and_never_scored(tmp_path: Path) -> None:
    greys = smooth_volume((9, 40, 64))
    spoilt = greys.copy()
    spoilt[4] = 0
    path = write_volume(tmp_path / "v.zarr", spoilt, (50, 10, 10))
    source, _ = open_source(VolumeSource(str(path), damaged="4"), "vEMDiffuse-a", 0.2)
    volume = source.whole
    assert volume.known[20].max() == 0 and volume.known[15].min() == volume.known[25].min() == 1
    assert np.allclose(volume.greys[20], (volume.greys[15] + volume.greys[25]) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("voxel", "mode", "message"),
    [
        ((50, 10, 10), "vEMDiffuse-i", "learns from isotropic volumes .* 50 x 10 x 10 nm"),
        ((10, 10, 10), "vEMDiffuse-a", "learns from anisotropic stacks"),
    ],
)
def test_a_volume_for_another_mode_is_refused(tmp_path: Path, voxel, mode: str, message: str) -> None:
    path = write_volume(tmp_path / "v.zarr", smooth_volume((9, 40, 64)), voxel)
    with pytest.raises(ConfigError, match=message):
        open_source(VolumeSource(str(path)), mode, 0.2)


def test_pairs_must_fit_each_other(tmp_path: Path) -> None:
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", smooth_volume((1, 64, 64))[0])
    tifffile.imwrite(tmp_path / "b.tif", smooth_volume((1, 128, 128))[0])
    entry = PairSource(str(tmp_path / "a.tif"), str(tmp_path / "b.tif"))
    train_on, held = open_pair(entry, 2, 0.25)
    assert train_on.condition.shape == (1, 48, 64) and held.target.shape == (1, 32, 128)
    with pytest.raises(InputError, match="register the pair first"):
        open_pair(entry, 1, 0.25)


# Calibration


def test_calibrated_intervals_hold_what_they_promise(tmp_path: Path) -> None:
    volume = smooth_volume((41, 64, 64), seed=3)
    greys = GreyMap(20.0, 230.0)
    weights = str(write_weights(tmp_path / "w.safetensors"))
    held = HeldOut(isotropic_volume(greys.normalise(volume)), greys, "uint8")
    first, second = held.halves()
    result = calibrate(weights, [first], [second], (4,), tile=(44, 64, 64))
    error, spread = (np.concatenate(x) for x in zip(*residuals(weights, first, 4, tile=(44, 64, 64)), strict=True))
    inside = (error <= 1.645 * result.scale["4"] * np.maximum(spread, 1e-6)).mean()
    assert inside == pytest.approx(0.9, abs=0.01)
    assert 0.6 < result.coverage["4"] < 1 and result.scatter["4"] > 0


# Whole runs


def small_config(folder: Path, mode: str = "vEMDiffuse-i", **settings) -> Path:
    fit_settings = {"steps": 4, "warmup": 2, "checkpoint_every": 2, "validate_every": 4}
    config = {
        "mode": mode,
        "out": str(folder / "run"),
        "network": {"architecture": "slab", "width": 8, "deep": 8, "blocks": 1},
        "factors": [2, 4],
        "planes": 8,
        "patch": 24,
        "data": "Made-up greys.",
        "licence": "CC0",
        "fit": fit_settings,
    }
    config |= settings
    config["fit"] = fit_settings | settings.get("fit", {})
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def load(path: Path) -> Request:
    from emdiffuse_vol.config import load_training

    return load_training(str(path), {})


@pytest.mark.parametrize(("mode", "voxel"), [("vEMDiffuse-i", (10, 10, 10)), ("vEMDiffuse-a", (50, 10, 10))])
def test_the_command_trains_weights_that_reconstruct(tmp_path: Path, mode: str, voxel) -> None:
    from click.testing import CliRunner

    from emdiffuse_vol.cli.main import main

    path = write_volume(tmp_path / "v.zarr", smooth_volume((16, 48, 64)), voxel)
    config = small_config(tmp_path, mode, volumes=[{"path": str(path)}], held_out=0.4)
    result = CliRunner().invoke(main, ["train", str(config)])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "run"
    weights = load_weights(str(folder / "run.safetensors"))
    weights.check(mode, 4)
    assert weights.metadata["gaps"] == [1.5, 4.67] and weights.metadata["training"]["licence"] == "CC0"
    assert set(weights.metadata["calibration"]["scale"]) == {"4"}
    card = (folder / "run.md").read_text()
    assert "Made-up greys" in card and "| 4 |" in card and "4 steps" in card
    assert {"best.safetensors", "last.safetensors", "log.jsonl", "scores.jsonl"} <= {p.name for p in folder.iterdir()}
    assert any(p.name.startswith("events.out") for p in folder.iterdir())
    stack = write_volume(tmp_path / "s.zarr", smooth_volume((6, 48, 64)), (40, 10, 10))
    made = ["reconstruct", str(stack), "--mode", mode, "--weights", str(folder / "run.safetensors")]
    result = CliRunner().invoke(main, [*made, "--out", str(tmp_path / "iso.zarr")])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("difficulty", [False, True])
def test_the_published_network_is_trained_for_planes(tmp_path: Path, difficulty: bool) -> None:
    path = write_volume(tmp_path / "v.zarr", smooth_volume((16, 40, 40)), (10, 10, 10))
    config = small_config(
        tmp_path,
        volumes=[{"path": str(path)}],
        network={"architecture": "unet-vem"},
        factors=[3],
        held_out=0.3,
        batch=1,
        difficulty=difficulty,
        fit={"steps": 2, "optimizer": "adamw"},
    )
    weights = load_weights(str(train(load(config))))
    assert weights.metadata["gaps"] == [3.0, 3.0] and isinstance(weights.net, UNet)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ("difficulty" in rows[0]) == difficulty


@pytest.mark.parametrize(("mode", "factor"), [("EMDiffuse-n", 1), ("EMDiffuse-r", 2)])
def test_pairs_train_restoration(tmp_path: Path, mode: str, factor: int) -> None:
    import tifffile

    clean = smooth_volume((1, 96, 96))[0]
    tifffile.imwrite(tmp_path / "clean.tif", clean)
    tifffile.imwrite(tmp_path / "noisy.tif", clean[::factor, ::factor])
    pair = {"condition": str(tmp_path / "noisy.tif"), "target": str(tmp_path / "clean.tif")}
    config = small_config(
        tmp_path,
        mode,
        pairs=[pair],
        network={"architecture": "unet-2d"},
        factor=factor,
        held_out=0.4,
        batch=1,
        fit={"steps": 1, "optimizer": "adamw"},
    )
    weights = load_weights(str(train(load(config))))
    weights.check(mode, 1)
    # Fine-tuning goes on from there.
    request = replace(load(config), start_from=str(weights.path), out=str(tmp_path / "tuned"))
    tuned = load_weights(str(train(request)))
    assert tuned.metadata["training"]["start_from"] == str(weights.path)
    changed = [not torch.equal(a, b) for a, b in zip(weights.net.parameters(), tuned.net.parameters(), strict=True)]
    assert any(changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "vEMDiffuse-x"}, "mode 'vEMDiffuse-x' is unknown"),
        ({"volumes": []}, "learns from volumes; give volumes, and no pairs"),
        ({"factors": [1]}, "each 2 or more"),
        ({"held_out": 1.5}, "held_out is 1.5"),
        ({"network": {"architecture": "unet-2d"}}, "takes slab, plane, unet-vem"),
        ({"network": {"architecture": "slab", "breadth": 3}}, "network .*breadth"),
        ({"factors": [4, 5], "network": {"architecture": "unet-vem"}}, "knows one factor"),
        ({"fit": {"stepz": 3}}, "setting 'fit.stepz' is unknown; known: steps, minutes"),
        ({"volumes": [{"path": "v", "wight": 3}]}, "setting 'volumes.0.wight' is unknown; known: path, weight"),
        ({"augment": {"blur": "a lot"}}, "setting 'augment.blur'"),
        ({"factors": [40], "held_out": 0.3}, "not long enough to hide planes between sections 40 pixels apart"),
        ({"factors": [30], "held_out": 0.3}, "no volume has a part there that is long enough"),
        ({"network": {"architecture": "slab", "width": 7}}, "width must be even"),
        ({"network": {"architecture": "slab", "width": -8}}, "negative dimension"),
        ({"difficulty": True}, "difficulty is of the published networks"),
        ({"start_from": "vemdiffuse-i-fast", "difficulty": True}, "needs a second head"),
        ({"factor": 2}, "factor is 2; of EMDiffuse-r"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"fit": {"warmup": 0}}, "fit.warmup is 0; it must be above 0"),
        ({"fit": {"decay": 0}}, "fit.decay is 0.0; it must be above 0"),
        ({"fit": {"ema": 2}}, "fit.ema is 2.0; it must be from 0 to 1"),
        ({"fit": {"seed": -1}}, "fit.seed .* must not be below 0"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, settings, message: str) -> None:
    path = write_volume(tmp_path / "v.zarr", smooth_volume((16, 40, 40)), (10, 10, 10))
    config = small_config(tmp_path, **{"volumes": [{"path": str(path)}], **settings})
    with pytest.raises(ConfigError, match=message):
        train(load(config))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("architecture", "exact"), [("slab", False), ("unet-vem", True)])
def test_the_published_network_is_trained_in_float32_unless_asked(
    tmp_path: Path, monkeypatch, architecture, exact
) -> None:
    """As it is run: bfloat16 lacks the digits that tell its levels of noise apart."""
    asked = []
    monkeypatch.setattr("emdiffuse_vol.training.train.join_ranks", lambda device: (None, device))
    monkeypatch.setattr("emdiffuse_vol.training.train.choose_device", lambda *args, exact: asked.append(exact))
    config = small_config(tmp_path, volumes=[{"path": "no.zarr"}], network={"architecture": architecture}, factors=[3])
    with pytest.raises(InputError):
        train(load(config))
    assert asked == [exact]


def test_weights_for_another_mode_are_no_start(tmp_path: Path) -> None:
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", smooth_volume((1, 96, 96))[0])
    config = small_config(
        tmp_path,
        "EMDiffuse-n",
        pairs=[{"condition": str(tmp_path / "a.tif"), "target": str(tmp_path / "a.tif")}],
        start_from="vemdiffuse-i-fast",
    )
    with pytest.raises(ConfigError, match="choose weights for EMDiffuse-n"):
        train(load(config))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """`torchrun` over gloo: both end with the same weights, and those are not what one process alone makes."""
    path = write_volume(tmp_path / "v.zarr", smooth_volume((30, 48, 64)), (10, 10, 10))
    config = small_config(tmp_path, volumes=[{"path": str(path)}], held_out=0.3)
    alone = replace(load(config), out=str(tmp_path / "alone"))
    train(alone)
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import sys, torch, torch.distributed as dist\n"
        "from emdiffuse_vol.config import load_training\n"
        "from emdiffuse_vol.training.train import train\n"
        "runs = []\n"
        "train(load_training(sys.argv[1], {}), lambda run, row: runs.append(run))\n"
        "flat = torch.cat([p.detach().flatten() for p in runs[-1].net.parameters()])\n"
        "both = [torch.empty_like(flat) for _ in range(2)]\n"
        "dist.all_gather(both, flat)\n"
        "assert torch.equal(*both) and runs[-1].ranks.world == 2\n"
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(probe), str(config)]
    done = subprocess.run(
        run, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together, single = (load_weights(str(tmp_path / n / f"{n}.safetensors")).net for n in ("run", "alone"))
    assert any(not torch.equal(a, b) for a, b in zip(together.parameters(), single.parameters(), strict=True))
    rows = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "v.zarr", smooth_volume((30, 48, 64)), (10, 10, 10))
    config = small_config(
        tmp_path, volumes=[{"path": str(path)}], held_out=0.3, fit={"steps": 30, "checkpoint_every": 3}
    )
    command = [sys.executable, "-m", "emdiffuse_vol", "train", str(config)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "run" / "log.jsonl"
    kills = 0
    for after in (4, 11, 20):
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if log.exists() and len(log.read_text().splitlines()) >= after:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait()
    assert kills
    assert subprocess.run(command, check=False, env=env, capture_output=True).returncode == 0
    # In a process of the same kind: the number of threads decides the last bits.
    unbroken = [*command, "--out", str(tmp_path / "unbroken")]
    assert subprocess.run(unbroken, check=False, env=env, capture_output=True).returncode == 0
    rows = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in file.read_text().splitlines()]
        for file in (log, tmp_path / "unbroken" / "log.jsonl")
    ]
    assert rows[0] == rows[1]
