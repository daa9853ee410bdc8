"""`--adapt`: weights that learn from the volume they are to reconstruct, then the run itself, in one command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from volumes import small_request

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.models.checkpoints import load_weights
from emdiffuse_vol.stores.image import open_array
from emdiffuse_vol.training.adapt import adapted, parse_duration


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["10", "m", "-3m", "0s", "10 minutes"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"such as 90s, 10m or 1\.5h"):
        parse_duration(text)


def test_one_command_adapts_and_reconstructs_and_the_same_command_uses_the_same_weights(tmp_path: Path) -> None:
    request = small_request(tmp_path)
    command = ["reconstruct", request.input, "--out", request.out, "--weights", request.weights, "--adapt", "1s"]
    command += ["--shard", "64,64,64", "--tile", "64,64,64"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out.zarr.adapted"
    weights = load_weights(str(folder / "adapted.safetensors"))
    base = load_weights(request.weights)
    assert weights.metadata["training"]["start_from"] == request.weights
    changed = [not np.array_equal(a, b) for a, b in zip(weights.net.parameters(), base.net.parameters(), strict=True)]
    assert any(changed)
    assert weights.metadata["calibration"]["scale"]
    assert open_array(request.out).read().result().any()
    written = (folder / "adapted.safetensors").stat().st_mtime_ns
    assert CliRunner().invoke(main, command).exit_code == 0
    assert (folder / "adapted.safetensors").stat().st_mtime_ns == written
    other = CliRunner().invoke(main, [*command, "--damaged", "3"])
    assert other.exit_code == 1 and "damaged is None there, 3 here" in other.output
    plain = CliRunner().invoke(main, [arg for arg in command if arg not in ("--adapt", "1s")])
    assert plain.exit_code == 1 and "weights_sha256" in plain.output


def test_only_a_mode_that_learns_from_the_volume_adapts(tmp_path: Path) -> None:
    request = replace(small_request(tmp_path), mode="vEMDiffuse-i", adapt="1s")
    with pytest.raises(ConfigError, match="as vEMDiffuse-a does; mode is vEMDiffuse-i"):
        adapted(request)
    assert adapted(replace(request, adapt=None)).weights == request.weights


def test_a_run_that_cannot_start_does_not_adapt(tmp_path: Path) -> None:
    request = replace(small_request(tmp_path), adapt="1s", members=1)
    with pytest.raises(ConfigError, match="members is 1"):
        adapted(request)
    assert not Path(f"{request.out}.adapted").exists()
