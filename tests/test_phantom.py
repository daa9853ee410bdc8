"""The phantom: a pure function of seed and position that looks like neural tissue."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.stores import phantom as module
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.phantom import PhantomVolume, phantom
from emdiffuse_vol.stores.random_fields import shot

ANISOTROPIC, ISOTROPIC = (40.0, 8.0, 8.0), (8.0, 8.0, 8.0)
WHOLE = Box((-7, -50, 100), (17, 70, 220))


@pytest.fixture(scope="module")
def whole() -> np.ndarray:
    return phantom(WHOLE, ANISOTROPIC, seed=3)


def box_inside(whole: Box) -> st.SearchStrategy[Box]:
    spans = [
        st.tuples(st.integers(a, b), st.integers(a, b)).map(sorted)
        for a, b in zip(whole.start, whole.stop, strict=True)
    ]
    return st.tuples(*spans).map(lambda s: Box(tuple(a for a, _ in s), tuple(b for _, b in s)))


@settings(max_examples=60, deadline=None)
@given(box=box_inside(WHOLE))
def test_any_box_gives_the_voxels_of_a_larger_box(whole: np.ndarray, box: Box) -> None:
    np.testing.assert_array_equal(phantom(box, ANISOTROPIC, seed=3), whole[box.slices(WHOLE.start)])


@pytest.mark.parametrize("patch", [(32, 32, 32), (7, 100, 33)])
def test_greys_do_not_depend_on_how_the_work_is_cut(
    whole: np.ndarray, patch: Triple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATCH", patch)
    np.testing.assert_array_equal(phantom(WHOLE, ANISOTROPIC, seed=3), whole)


def test_coarse_stack_is_every_fifth_plane_of_the_isotropic_volume() -> None:
    fine = phantom(Box((-10, 0, 0), (31, 64, 64)), ISOTROPIC)
    np.testing.assert_array_equal(phantom(Box((-2, 0, 0), (7, 64, 64)), ANISOTROPIC), fine[::5])


def test_far_from_the_origin_nothing_changes_in_kind() -> None:
    greys = phantom(Box((10**6, -(10**6), 10**6), (10**6 + 4, -(10**6) + 200, 10**6 + 200)), ISOTROPIC)
    assert 100 < greys.mean() < 160
    assert greys.std() > 20


def test_contrast_is_that_of_real_sections() -> None:
    greys = phantom(Box.of((10, 384, 384)), ANISOTROPIC)
    assert 115 < greys.mean() < 145
    assert 25 < greys.std() < 40
    assert np.mean((greys == 0) | (greys == 255)) < 1e-4


def test_membranes_are_darker_than_cytoplasm() -> None:
    """Within 4 nm of a membrane by the diagram itself, against 25 nm and more away from one."""
    axes = tuple(np.arange(n) * 8.0 for n in (12, 200, 200))
    _, _, distance, mitochondrion, _ = module._cells(axes, 0)  # type: ignore[arg-type]
    greys = phantom(Box.of((12, 200, 200)), ISOTROPIC)
    membrane, cytoplasm = greys[distance < 4], greys[(distance > 25) & (mitochondrion <= 0)]
    assert 0.01 < membrane.size / greys.size < 0.2
    assert membrane.mean() < cytoplasm.mean() - 40
    assert greys[mitochondrion > 12].mean() < cytoplasm.mean() - 30


def test_neighbouring_planes_are_alike_and_distant_ones_are_not() -> None:
    greys = phantom(Box.of((41, 200, 200)), ISOTROPIC).astype(float)
    near, far = (np.corrcoef(greys[0].ravel(), greys[k].ravel())[0, 1] for k in (1, 40))
    assert near > 0.6
    assert abs(far) < 0.35


def test_seeds_differ_and_noise_is_white() -> None:
    box = Box.of((2, 128, 128))
    one, other = (phantom(box, ISOTROPIC, seed) for seed in (0, 1))
    assert np.mean(one == other) < 0.1
    noise = shot(tuple(np.arange(n) * 8.0 for n in (8, 64, 64)), 0)  # type: ignore[arg-type]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.01
    assert abs(np.corrcoef(noise[..., 1:].ravel(), noise[..., :-1].ravel())[0, 1]) < 0.02


def test_url_says_all() -> None:
    volume = PhantomVolume.from_url("phantom:4x32x48?voxel_size=45,4.3,4.3&seed=7")
    assert volume.spec.shape == (4, 32, 48)
    assert volume.spec.voxel_size == (45.0, 4.3, 4.3)
    box = Box((1, 8, 8), (3, 20, 30))
    again = open_volume(volume.url, **volume.options)
    np.testing.assert_array_equal(again.read(box), volume.read(box))
    assert again.spec == volume.spec
    assert volume.spec.identity != PhantomVolume.from_url("phantom:4x32x48?voxel_size=45,4.3,4.3&seed=8").spec.identity


@pytest.mark.parametrize("url", ["phantom:4x32", "phantom:4x32x0", "phantom:4x4x4?size=3", "phantom:4x4x4?seed=a"])
def test_a_wrong_url_is_one_line(url: str) -> None:
    with pytest.raises(InputError) as error:
        PhantomVolume.from_url(url)
    assert "\n" not in str(error.value)


def test_sample_then_info(tmp_path: Path) -> None:
    out = tmp_path / "tissue.zarr"
    arguments = ["sample", str(out), "--shape", "5,64,70", "--voxel-size", "40,8,8", "--seed", "2"]
    made = CliRunner().invoke(main, arguments)
    assert made.exit_code == 0, made.output
    facts = json.loads(CliRunner().invoke(main, ["info", str(out), "--json"]).output)
    assert facts["shape"] == [5, 64, 70]
    assert facts["voxel_size_nm"] == [40.0, 8.0, 8.0]
    assert facts["factor_to_isotropy"] == 5
    box = Box.of((5, 64, 70))
    np.testing.assert_array_equal(open_volume(out).read(box), phantom(box, ANISOTROPIC, seed=2))
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert "--overwrite" in again.output
    assert CliRunner().invoke(main, [*arguments, "--overwrite"]).exit_code == 0
