"""What is fastest here is looked for once, and used wherever nothing else was asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from volumes import small_request

from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.models.checkpoints import load_weights
from emdiffuse_vol.reconstruct import tuning
from emdiffuse_vol.reconstruct.device import choose_device
from emdiffuse_vol.reconstruct.predictors import SlabPredictor
from emdiffuse_vol.reconstruct.run import NONE, prepare, reconstruct


def test_runs_use_what_was_tuned_and_begun_outputs_go_on_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMDVOL_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(tuning, "DEPTH", 4)
    monkeypatch.setattr(tuning, "SIDES", (32, 64))
    monkeypatch.setattr(SlabPredictor, "CORE", (64, 64, 64))
    request = small_request(tmp_path, tile=None)
    begun = replace(request, out=str(tmp_path / "begun.zarr"), executor=NONE)
    reconstruct(begun)
    weights, rows = load_weights(request.weights or ""), []
    best = tuning.tune(weights, "cpu", rows.append)
    assert max(rows, key=lambda row: row.voxels_per_second).setting == best
    assert {row.setting.tile for row in rows} == {(64, 32, 32), (64, 64, 64)}
    assert {row.setting.precision for row in rows} == {"float32", choose_device("cpu").precision}
    found = prepare(request)
    assert (found.job.precision, found.job.tile, found.request.workers) == (best.precision, best.tile, best.workers)
    assert prepare(replace(request, tile=(64, 32, 64), precision="float32")).job.tile == (64, 32, 64)
    going_on = prepare(replace(begun, executor=None))
    assert going_on.job == replace(prepare(begun).job, out=going_on.job.out) and going_on.job.tile is None


def test_only_our_slabs_are_tuned(tmp_path: Path) -> None:
    weights = load_weights(small_request(tmp_path).weights or "")
    with pytest.raises(ConfigError, match="nothing to tune"):
        tuning.tune(replace(weights, net=weights.net.embed), "cpu")
