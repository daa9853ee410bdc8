"""Greys that networks do not expect are turned before them and back after them: negatives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from volumes import run, small_request, smooth_volume, write_volume, write_weights

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.reconstruct.run import prepare
from emdiffuse_vol.stores.metadata import read_attributes

SHAPE = (3, 24, 40)


def stack(folder: Path, greys: np.ndarray, name: str) -> str:
    folder.mkdir(exist_ok=True)
    write_weights(folder / "w.safetensors")
    return str(write_volume(folder / f"{name}.zarr", greys, (50, 10, 10)))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_the_negative_of_a_stack_becomes_the_negative_of_its_reconstruction(tmp_path: Path, dtype: str) -> None:
    greys = smooth_volume(SHAPE, dtype=dtype)
    known = small_request(tmp_path, input=stack(tmp_path, greys, "a"), out=f"{tmp_path}/iso.zarr", tile=(32, 32, 64))
    mean, spread = run(known).astype(np.float64)
    negative = small_request(tmp_path, input=stack(tmp_path, 255 - greys, "b"), tile=(32, 32, 64), invert=True)
    turned, same = run(negative).astype(np.float64)
    np.testing.assert_array_equal(turned[::5], (255 - greys).astype(np.float64))
    least = 1 if dtype == "uint8" else 1e-2
    assert np.abs(turned - (255 - mean)).max() <= least and np.abs(same - spread).max() <= least
    assert spread.max() > 3 and np.abs(mean[1:5] - greys[:1]).max() > 3  # there is something to compare
    made = read_attributes(Path(negative.out))["emdvol"]["greys"]
    assert made["inverted"] and made["low"] < made["high"]
    with pytest.raises(ConfigError, match="leave out --invert"):
        prepare(small_request(tmp_path, input=negative.input, invert=True, adapt="1m"))


def test_a_negative_is_noticed_and_said_in_one_line(tmp_path: Path) -> None:
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(np.random.default_rng(0).standard_normal((9, 64, 80)), (0, 3, 3))
    walls = np.abs(noise) < noise.std() / 5  # thin and dark, as membranes are
    greys = gaussian_filter(np.where(walls, 60.0, 180.0), (0, 1, 1)).astype(np.uint8)
    out = ["--out", str(tmp_path / "iso.zarr"), "--weights", str(tmp_path / "w.safetensors"), "--executor", "none"]
    good, bad = stack(tmp_path, greys, "good"), stack(tmp_path, 255 - greys, "bad")
    for source, flags, noted in ((good, [], 0), (bad, [], 1), (bad, ["--invert"], 0)):
        shown = CliRunner().invoke(main, ["reconstruct", source, *out, *flags, "--overwrite"])
        assert shown.exit_code == 0, shown.output
        lines = [line for line in shown.stderr.splitlines() if "contrast may be inverted" in line]
        assert len(lines) == noted and all("--invert" in line for line in lines)
