"""Training: what is hidden, what is optimised, and that a resumed run is an unbroken one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from volumes import smooth_volume, write_weights

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.models.slab import SlabNet
from emdiffuse_vol.training.calibrate import calibrate, residuals
from emdiffuse_vol.training.crops import cut_crop, random_crop
from emdiffuse_vol.training.fit import FitSettings, batch_tensors, fit, learning_rate
from emdiffuse_vol.training.muon import Muon, orthogonal

VOLUME = smooth_volume((40, 40, 40)).astype(np.float32) / 128 - 1
QUICK = FitSettings(
    steps=6, batch=1, planes=6, patch=16, factors=(2, 3), warmup=2, members_from=0.5, checkpoint_every=2
)


def test_crops_hide_planes_between_sections_and_keep_their_places() -> None:
    crop = cut_crop(VOLUME, 4, 8, 3, slice(0, 16), slice(4, 20))
    features, truth, t, hidden, _ = batch_tensors([crop])
    assert truth.shape == (1, 1, 13, 16, 16)
    assert torch.equal(truth[0, 0], torch.from_numpy(VOLUME[8:21, :16, 4:20]))
    assert torch.equal(features[0, 1, ~hidden], truth[0, 0, ~hidden])  # nearest section below, at a section
    below = torch.from_numpy(VOLUME[8:20:4, :16, 4:20]).repeat_interleave(4, 0)
    assert torch.equal(features[0, 1, :12], below)
    assert torch.equal(features[0, 4, :4], torch.from_numpy(VOLUME[[16] * 4, :16, 4:20]))
    assert t.tolist() == [0, 0.25, 0.5, 0.75] * 3 + [0]


def test_context_beyond_the_ends_is_mirrored_in_sections() -> None:
    crop = cut_crop(VOLUME, 10, 0, 3, slice(0, 8), slice(0, 8))
    assert np.array_equal(crop.sections[0], VOLUME[10, :8, :8])  # section -1 is section 1
    assert np.array_equal(crop.sections[-2], VOLUME[20, :8, :8])  # sections 0..3; 4 is 2, 5 is 1
    assert np.array_equal(crop.sections[-1], VOLUME[10, :8, :8])


def test_crops_come_from_all_places_and_orientations() -> None:
    ramp = np.arange(40, dtype=np.float32)[:, None, None] * np.ones((1, 40, 40), np.float32)
    axes = set()
    for seed in range(40):
        crop = random_crop(np.random.default_rng(seed), ramp, 3, 6, 16)
        slopes = [float(np.diff(crop.truth, axis=axis).mean()) for axis in range(3)]
        axes.add((int(np.argmax(np.abs(slopes))), slopes[int(np.argmax(np.abs(slopes)))] > 0))
    assert len(axes) == 6


def test_a_resumed_run_continues_the_same_loss_curve_bit_for_bit(tmp_path: Path) -> None:
    def losses(folder: Path, *stops: int) -> tuple[list[float], SlabNet]:
        rows: list[float] = []

        class Stop(Exception):
            pass

        for stop in (*stops, None):
            torch.manual_seed(0)
            net = SlabNet(8, 8, 1)

            def note(row, stop=stop):
                rows.append((row["step"], row["mse"], row.get("crps")))
                if row["step"] == stop:
                    raise Stop

            try:
                fit(net, [VOLUME], QUICK, folder, note)
            except Stop:
                continue
        return rows, net

    unbroken, first = losses(tmp_path / "a")
    broken, second = losses(tmp_path / "b", 3, 4)
    assert unbroken == sorted(set(broken))  # step 3 was made twice, from the checkpoint at 2, with the same loss
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_learning_lowers_the_error_below_linear_interpolation(tmp_path: Path) -> None:
    rows = []
    torch.manual_seed(0)
    settings = replace(QUICK, steps=60, learning_rate=3e-3, members_from=1.0, batch=2)
    fit(SlabNet(8, 16, 1), [VOLUME], settings, tmp_path, rows.append)
    assert np.mean([row["mse"] for row in rows[-15:]]) < 0.9


def test_learning_rate_rises_stays_and_falls() -> None:
    settings = FitSettings(steps=1000, warmup=100, decay=0.2, learning_rate=1.0)
    assert learning_rate(49, settings) == 0.5
    assert learning_rate(500, settings) == 1.0
    assert learning_rate(900, settings) == pytest.approx(0.5)
    assert learning_rate(999, settings) == pytest.approx(0.005)


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


def test_calibrated_intervals_hold_what_they_promise(tmp_path: Path) -> None:
    volume = smooth_volume((41, 64, 64), seed=3)
    weights = str(write_weights(tmp_path / "w.safetensors"))
    lower, upper = Box((0, 0, 0), (41, 32, 64)), Box((0, 32, 0), (41, 64, 64))
    result = calibrate(weights, volume, lower, upper, (4,), tile=(44, 64, 64))
    error, spread = residuals(weights, volume, lower, 4, tile=(44, 64, 64))
    inside = (error <= 1.645 * result.scale["4"] * np.maximum(spread, 1e-6)).mean()
    assert inside == pytest.approx(0.9, abs=0.01)
    assert 0.6 < result.coverage["4"] < 1
