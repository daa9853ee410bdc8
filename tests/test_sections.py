"""Modes that restore sections, by themselves and before the planes between them: the same engine, the same laws."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import random_section, random_slab
from test_laws import CPU, predict_all
from volumes import file_hashes, run, small_request, smooth_volume, write_volume, write_weights

from emdiffuse_vol.errors import ConfigError, EmdvolError, WeightsError
from emdiffuse_vol.geometry.axial import AxialGrid
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.models.checkpoints import Weights, save_weights
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.modes import Chain, Isotropic, SectionWise, stages_of
from emdiffuse_vol.modes.mode import to_input
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.predictors import ChainPredictor, PlanePredictor, Sampling, SectionPredictor
from emdiffuse_vol.reconstruct.run import prepare, reconstruct
from emdiffuse_vol.stores.opening import open_volume

SHAPE = (5, 60, 100)
N, R, BOTH = "EMDiffuse-n", "EMDiffuse-r", "EMDiffuse-n+vEMDiffuse-a"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sections")
    write_volume(folder / "in.zarr", smooth_volume(SHAPE), (50, 10, 10))
    write_weights(folder / "w.safetensors")
    for mode, factor in ((N, 1), (R, 2)):
        config = {"context": 1, "factor": factor, "width": 8, "deep": 12, "light": 8}
        calibration = {"scale": {str(factor): 1.5}, "coverage": {str(factor): 0.9}, "members": 4}
        save_weights(
            folder / f"{mode}.safetensors",
            random_section(factor=factor),
            architecture="section",
            config=config,
            modes=[mode],
            calibration=calibration,
        )
    return folder


def ask(folder: Path, mode: str, **given: object) -> Request:
    weights = "+".join(str(folder / (f"{m}.safetensors" if m in (N, R) else "w.safetensors")) for m in mode.split("+"))
    settings = {"out": str(folder / f"{mode}.zarr"), "mode": mode, "weights": weights, "tile": (32, 64, 64)}
    return small_request(folder, **(settings | {"members": 2} | given))


def test_a_super_resolved_pixel_depends_on_the_pixels_around_its_place() -> None:
    mode = SectionWise(SHAPE, lateral=2, context=1)
    assert mode.output_shape == (5, 120, 200)
    assert mode.read_box(Box((0, 3, 8), (2, 9, 10))) == Box((-1, 1, 4), (3, 5, 5))
    assert mode.region(Box((1, 10, 20), (3, 20, 30))) == Box((1, 20, 40), (3, 40, 60))
    # Two output pixels lie in one of the input, a quarter of it to either side of its centre.
    assert to_input(mode, (3.0, 0.0, 5.0)) == (3.0, -0.25, 2.25)


def test_a_chain_reads_what_both_of_its_modes_need() -> None:
    first = SectionWise(SHAPE, lateral=2, context=1)
    then = Isotropic((5, 120, 200), AxialGrid(5, Fraction(5)), 5.0)
    mode = Chain(SHAPE, first, then, halo=8)
    box = Box((6, 40, 40), (9, 60, 60))  # between sections 1 and 2; two more on either side, and their neighbours
    assert mode.read_box(box) == Box((-1, 12, 12), (5, 38, 38))
    assert mode.region(None) == then.region(None) and not mode.axial.copied(np.arange(21)).any()
    assert stages_of(BOTH) == (N, "vEMDiffuse-a") and stages_of(R) == (R, None) and stages_of("vEMDiffuse-i")[0] is None


@pytest.mark.parametrize("factor", [1, 2])
def test_tiled_sections_equal_untiled_ones(factor: int) -> None:
    sections = smooth_volume((3, 60, 90)).astype(np.float32)
    mode = SectionWise(sections.shape, factor, 1)
    outputs = []
    for tile in ((3, 60 * factor, 92 * factor), (1, 32, 48)):
        net = random_section(factor=factor)
        predictor = SectionPredictor(net, mode, Sampling(2, 0, "ancestral", 1, tile), CPU)
        outputs.append(predict_all(mode, predictor, sections))
    assert np.abs(outputs[0] - outputs[1]).max() < 2e-3  # greys of 0..255: float rounding


def test_a_tiled_chain_equals_an_untiled_one_and_its_sections_are_those_restored_alone() -> None:
    sections = smooth_volume((3, 30, 60)).astype(np.float32)
    then = Isotropic((3, 30, 60), AxialGrid(3, Fraction(4)), 4.0)
    mode = Chain((3, 30, 60), SectionWise((3, 30, 60), 1, 1), then, halo=32)
    alone = SectionPredictor(random_section(), mode.first, Sampling(2, 0, "ancestral", 1, None), CPU)
    first, second = (
        Weights("w", Path("w"), "", "", {}, {"calibration": {"scale": {key: scale}}}, net)
        for key, scale, net in (("1", 1.0, random_section()), ("4", 3.0, random_slab()))
    )
    outputs = []
    for tile in ((12, 32, 60), (8, 32, 32)):
        predictor = ChainPredictor(first, second, mode, Sampling(2, 0, "ancestral", 1, tile), CPU)
        outputs.append(predict_all(mode, predictor, sections))
    assert np.abs(outputs[0] - outputs[1]).max() < 2e-3
    restored = predict_all(mode.first, alone, sections)
    assert np.abs(outputs[0][:, ::4] - restored).max() < 2e-3
    assert (outputs[0][1] > 0).mean() > 0.99  # nothing was measured without noise


def test_a_chain_carries_the_uncertainty_of_the_sections_to_the_planes_between_them() -> None:
    sections = smooth_volume((3, 32, 32)).astype(np.float32)
    then = Isotropic((3, 32, 32), AxialGrid(3, Fraction(4)), 4.0)
    mode = Chain((3, 32, 32), SectionWise((3, 32, 32), 1, 1), then, halo=32)

    def spread(first_scale: float, then_scale: float) -> np.ndarray:
        first, second = (
            Weights("w", Path("w"), "", "", {}, {"calibration": {"scale": {key: scale}}}, net)
            for key, scale, net in (("1", first_scale, random_section()), ("4", then_scale, random_slab()))
        )
        predictor = ChainPredictor(first, second, mode, Sampling(6, 0, "ancestral", 1, None), CPU)
        return predict_all(mode, predictor, sections)[1][2::4]

    of_sections, of_planes, both = spread(1, 1e-6), spread(1e-6, 1), spread(1, 1)
    assert of_sections.mean() > 0.1 and of_planes.mean() > 0.1
    # Independent, so their squares add; roughly, as what is added between sections depends on the sections drawn.
    assert np.mean(both**2) == pytest.approx(np.mean(of_sections**2) + np.mean(of_planes**2), rel=0.25)


@pytest.mark.parametrize("mode", [N, R, BOTH])
def test_runs_give_the_same_bytes_in_any_blocks(folder: Path, mode: str) -> None:
    request = ask(folder, mode)
    codes = run(request)
    assert codes.shape[1:] == {N: SHAPE, R: (5, 120, 200), BOTH: (21, 60, 100)}[mode]
    assert codes[0].std() > 5 and (codes[1] > 0).mean() > 0.98
    other = replace(request, out=f"{request.out}.other.zarr", block=(64, 64, 128), shard=(64, 64, 64), workers=2)
    reconstruct(other)
    assert file_hashes(other.out) == file_hashes(request.out)
    reconstruct(request)  # again: nothing to do, and the same job
    assert Output(Path(request.out)).sealed


def test_super_resolution_halves_the_pixels_and_says_where_they_are(folder: Path) -> None:
    prepared = prepare(ask(folder, R, out=str(folder / "r.zarr"), roi="0:5,10:60,0:100"))
    assert prepared.voxel_size == (50, 5, 5) and prepared.origin == (0, 97.5, -2.5)
    assert prepared.summary()["output"]["shape"] == (5, 100, 200)


def test_sections_of_a_chain_are_what_the_first_mode_gives(folder: Path) -> None:
    alone, chained = run(ask(folder, N, out=str(folder / "alone.zarr"))), run(ask(folder, BOTH))
    assert np.abs(chained[:, ::5].astype(int) - alone).max() <= 1  # greys rounded from values that agree to 1e-3
    made = Output(folder / f"{BOTH}.zarr").attributes
    assert made["fingerprint"]["first_weights_sha256"] and made["provenance"]["first_weights"]["name"] == N
    assert made["uncertainty"]["measured_coverage"] is None


def test_a_chain_bridges_damaged_sections(folder: Path) -> None:
    sections = smooth_volume(SHAPE)
    sections[2] = 255
    write_volume(folder / "torn.zarr", sections, (50, 10, 10))
    first, second = (
        run(ask(folder, BOTH, input=str(folder / f"{name}.zarr"), out=str(folder / f"{name}-out.zarr"), **bridge))
        for name in ("in", "torn")
        for bridge in ({"damaged": "2", "roi": "1:4,0:32,0:32"},)
    )
    assert first.shape == (2, 11, 32, 32) and (first == second).all()


def test_a_single_image_is_a_stack_of_one_section(folder: Path, tmp_path: Path) -> None:
    write_volume(tmp_path / "one.zarr", smooth_volume((1, 50, 60)), (1, 1, 1))
    codes = run(ask(folder, N, input=str(tmp_path / "one.zarr"), out=str(tmp_path / "out.zarr")))
    assert codes.shape == (2, 1, 50, 60) and codes[0].std() > 5


@pytest.mark.parametrize("factor", [1, 2])
def test_published_networks_for_sections_run_through_the_engine(factor: int) -> None:
    torch.manual_seed(0)
    net = UNet(in_channels=2, slices=False).eval().requires_grad_(False)
    sections = smooth_volume((1, 28 // factor, 28 // factor)).astype(np.float32)
    mode = SectionWise(sections.shape, factor)
    predictor = PlanePredictor(net, mode, Sampling(2, 0, "ddim", 2, (1, 28, 28)), CPU)
    mean, spread = predict_all(mode, predictor, sections)
    assert mean.shape == (1, 28, 28) and np.isfinite(mean).all() and spread.mean() > 0
    assert predictor.flops() > 0


def test_the_published_sampler_warns_of_steps_it_is_not_made_for(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_weights(folder / "p.safetensors", UNet(2, False), architecture="unet-2d", config={}, modes=[N], greys="dtype")
    weights = str(folder / "p.safetensors")
    prepared = prepare(ask(folder, N, weights=weights, sampler="legacy", steps=20, tile=None))
    assert "--steps 20 of sampler legacy: the first state" in caplog.text
    assert prepared.job.sampler == "ancestral"


@pytest.mark.parametrize(
    ("mode", "settings", "said"),
    [
        ("EMDiffuse-x", {}, "is unknown"),
        ("vEMDiffuse-a+EMDiffuse-n", {}, "is no chain; join one of EMDiffuse-n, .* to one of vEMDiffuse-i"),
        (N, {"damaged": "2"}, r"2? ?.*are damaged; vEMDiffuse modes bridge.*EMDiffuse-n\+vEMDiffuse-a"),
        (N, {"factor": 4}, "--factor 4 was asked for and the weights give 1 pixels"),
        (N, {"target_voxel_size": 5.0}, "EMDiffuse-n keeps it"),
        (BOTH, {"weights": "vemdiffuse-a-fast"}, "are for one mode and .* are two"),
    ],
)
def test_what_a_mode_cannot_do_is_refused(folder: Path, mode: str, settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare(ask(folder, mode, **settings))


def test_weights_of_another_mode_are_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match="serve EMDiffuse-r, not EMDiffuse-n"):
        prepare(ask(folder, N, weights=str(folder / f"{R}.safetensors")))


def test_a_chain_of_a_network_that_sees_a_whole_tile_is_refused(folder: Path) -> None:
    torch.manual_seed(0)
    net = UNet(in_channels=2, slices=False)
    save_weights(folder / "u.safetensors", net, architecture="unet-2d", config={}, modes=[N], greys="dtype")
    weights = f"{folder / 'u.safetensors'}+{folder / 'w.safetensors'}"
    with pytest.raises(EmdvolError, match="see a whole tile and a chain needs"):
        prepare(ask(folder, BOTH, weights=weights))


def test_a_mask_lies_where_it_is_on_a_finer_output(folder: Path) -> None:
    inside = np.zeros(SHAPE, np.uint8)
    inside[:, :, :32] = 1  # of the input: output pixels 0 to 63
    write_volume(folder / "mask.zarr", inside, (50, 10, 10))
    codes = run(ask(folder, R, out=str(folder / "masked.zarr"), mask=str(folder / "mask.zarr"), tile=(16, 64, 64)))
    assert codes[0, :, :, :64].std() > 5 and (codes[:, :, :, 64:] == 0).all()
    assert open_volume(folder / "masked.zarr", channel=0).spec.shape == (5, 120, 200)
