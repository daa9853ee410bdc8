"""Greys that networks do not expect are mended before them and back after them: negatives, uneven sections."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from volumes import run, small_request, smooth_volume, write_volume, write_weights

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.reconstruct.greys import SectionMap, measure_sections
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


def uneven(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Contrast and brightness of sections, far from their neighbours'."""
    rng = np.random.default_rng(1)
    return rng.uniform(0.7, 1.3, count)[:, None, None], rng.uniform(-25, 25, count)[:, None, None]


def test_sections_are_brought_to_the_trend_of_their_neighbours() -> None:
    greys = smooth_volume((30, 80, 90), dtype="float32")
    ramp = np.linspace(0, 60, 30)[:, None, None]  # a slow change is no fault of sections
    contrast, brightness = uneven(30)
    spoilt = (greys * contrast + brightness + ramp).astype(np.float32)
    found = measure_sections(spoilt.shape, lambda box: spoilt[box.slices()])
    even = found.even(spoilt, 0)
    before, after = (np.abs(np.diff(v.mean((1, 2)))).mean() for v in (spoilt, even))
    assert after < before / 5
    assert np.polyfit(np.arange(30), even.mean((1, 2)), 1)[0] == pytest.approx(60 / 29, rel=0.3)
    np.testing.assert_allclose(found.even(spoilt[1:4][::-1], -3), even[1:4][::-1])  # mirrored at the end of the stack
    still = np.zeros(30, np.float32)
    np.testing.assert_allclose(found.undo(even, np.arange(30), still), spoilt, atol=1e-3)
    np.testing.assert_array_equal(SectionMap().even(spoilt, 0), spoilt)


def test_uneven_sections_are_evened_for_the_network_alone(tmp_path: Path) -> None:
    """The same section again and again, spoilt: between two of them lies what would lie there without, in greys half
    way; whatever the blocks."""
    one = smooth_volume((1, 24, 70), dtype="float32")
    contrast, brightness = uneven(5)
    plain, spoilt = np.repeat(one, 5, axis=0), (one * contrast + brightness).astype(np.float32)
    made = {}
    for name, greys, settings in (
        ("plain", plain, {}),
        ("even", spoilt, {"even_sections": True}),
        ("blocks", spoilt, {"even_sections": True, "block": (64, 64, 128)}),
    ):
        request = small_request(tmp_path, input=stack(tmp_path, greys, f"in-{name}"), out=f"{tmp_path}/{name}.zarr")
        made[name] = run(replace(request, tile=(32, 32, 64), members=2, **settings))
    np.testing.assert_array_equal(made["even"], made["blocks"])
    mean, spread = made["even"]
    np.testing.assert_array_equal(mean[::5], spoilt)
    job = read_attributes(tmp_path / "even.zarr")["emdvol"]["job"]
    found = SectionMap(*map(tuple, job["section_greys"]))
    again = found.even(spoilt, 0)
    np.testing.assert_allclose(again, np.broadcast_to(again[:1], again.shape), atol=1e-2)
    assert np.ptp(found.gains) > 0.2
    scale = again[0].std() / one.std()  # what the network sees is the plain stack, but for one affine map of all of it
    shift = again[0].mean() - scale * one.mean()
    place = np.arange(21) / 5
    gain, offset = (np.interp(place, np.arange(5), values)[:, None, None] for values in (found.gains, found.offsets))
    plain_mean, plain_spread = made["plain"]
    np.testing.assert_allclose(mean, (scale * plain_mean + shift - offset) / gain, atol=0.05)
    np.testing.assert_allclose(spread, scale * plain_spread / gain, atol=0.05)
    assert spread.max() > 1
