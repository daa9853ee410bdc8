"""`emdvol restore`: images and stacks in, images and stacks out; PNG; how much of an output can be relied on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from networks import random_section
from PIL import Image
from volumes import run, small_request, smooth_volume, write_volume

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.models.checkpoints import save_weights
from emdiffuse_vol.reconstruct.ledger import Ledger
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.reconstruct.reliability import GOOD, of_blocks, reliability
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.png import open_png
from emdiffuse_vol.viewing.crops import Shown, before, open_input
from emdiffuse_vol.viewing.report import Asked, write_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restore")
    for mode, factor in (("EMDiffuse-n", 1), ("EMDiffuse-r", 2)):
        config = {"context": 1, "factor": factor, "width": 8, "deep": 12, "light": 8}
        net = random_section(factor=factor)
        save_weights(folder / f"{mode}.safetensors", net, architecture="section", config=config, modes=[mode])
    image = smooth_volume((1, 50, 60))[0]
    Image.fromarray(image).save(folder / "image.png")
    tifffile.imwrite(folder / "stack.tif", smooth_volume((3, 50, 60), dtype="uint16"), photometric="minisblack")
    return folder


def emdvol(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def restore(folder: Path, source: str, out: Path, mode: str = "EMDiffuse-n", *more: object) -> tuple[int, str]:
    weights = folder / f"{mode}.safetensors"
    return emdvol("restore", folder / source, "--out", out, "--mode", mode, "--weights", weights, "--members", 2, *more)


def test_an_image_comes_back_as_an_image_with_its_uncertainty(folder: Path, tmp_path: Path) -> None:
    status, said = restore(folder, "image.png", tmp_path / "clean.png", "EMDiffuse-r")
    assert status == 0 and "reliable: " in said and "x 0.125" in said
    mean, uncertainty = (np.asarray(Image.open(tmp_path / f"clean{end}.png")) for end in ("", "_uncertainty"))
    assert mean.shape == uncertainty.shape == (100, 120) and mean.std() > 5 and uncertainty.mean() > 0
    # What the engine writes, no more and no less.
    codes = run(
        small_request(
            tmp_path / "run",
            input=str(folder / "image.png"),
            mode="EMDiffuse-r",
            weights=str(folder / "EMDiffuse-r.safetensors"),
            voxel_size=(1.0, 1.0, 1.0),
            members=2,
            tile=None,
            shard=None,
        )
    )
    assert (codes[:, 0] == np.stack([mean, uncertainty])).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean.png", "clean_uncertainty.png", "run"]


def test_a_stack_keeps_its_greys_and_sections(folder: Path, tmp_path: Path) -> None:
    status, _ = restore(folder, "stack.tif", tmp_path / "clean.tif")
    assert status == 0
    mean = tifffile.imread(tmp_path / "clean.tif")
    assert mean.shape == (3, 50, 60) and mean.dtype == np.uint16


@pytest.mark.parametrize(
    ("source", "out", "said"),
    [
        ("stack.tif", "clean.png", "a PNG holds one section"),
        ("image.png", "clean.zarr", "for OME-Zarr use emdvol reconstruct"),
        ("image.png", "there.png", "exists; choose another --out, or add --overwrite"),
        ("nowhere.png", "clean.png", "does not exist"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path, source: str, out: str, said: str) -> None:
    (tmp_path / "there.png").write_text("precious")
    status, output = restore(folder, source, tmp_path / out)
    assert status == 1 and said in output
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]
    assert (tmp_path / "there.png").read_text() == "precious"


def test_a_png_is_a_stack_of_one_section(folder: Path, tmp_path: Path) -> None:
    deep = (smooth_volume((1, 9, 9))[0].astype(np.uint16) * 200).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    volume = open_volume(tmp_path / "deep.png", voxel_size=(1, 2, 2))
    assert volume.spec.dtype == "uint16" and (volume.read(Box.of((1, 9, 9)))[0] == deep).all()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(InputError, match="pixels of kind RGB, expected grey"):
        open_png(tmp_path / "colour.png", voxel_size=(1, 1, 1))
    (tmp_path / "cut.png").write_bytes((tmp_path / "deep.png").read_bytes()[:60])
    with pytest.raises(InputError, match="is damaged"):
        open_png(tmp_path / "cut.png", voxel_size=(1, 1, 1))


def test_blocks_below_the_threshold_are_reliable(folder: Path, tmp_path: Path) -> None:
    request = small_request(tmp_path)
    run(request)
    output = Output(tmp_path / "out.zarr")
    job = output.job()
    ledger = Ledger(output.path, "", job.plan.grid)
    p99 = np.sort(of_blocks("p99", job, ledger))
    assert len(p99) == 4 and p99[0] < p99[1] and p99.max() <= 31.875 / 255
    found = reliability(output, float(p99[0] + p99[1]) / 2)
    assert (found.blocks, found.share) == (4, 0.25) and str(found).startswith("reliable: 25% of 4 blocks")
    assert found.good == (of_blocks("mean", job, ledger) < GOOD).mean()


def test_the_report_of_restored_sections_shows_the_input_under_them(folder: Path, tmp_path: Path) -> None:
    greys = smooth_volume((3, 50, 60))
    write_volume(tmp_path / "in.zarr", greys, (50, 10, 10))
    weights = str(folder / "EMDiffuse-r.safetensors")
    request = small_request(tmp_path, mode="EMDiffuse-r", weights=weights, members=2, roi="1:3,10:50,0:60")
    run(request)
    shown = Shown(Path(request.out))
    nearest, _ = before(shown, open_input(shown, None), Box((0, 3, 0), (2, 9, 120)))
    assert (nearest == greys[1:3, 10:].repeat(2, axis=1).repeat(2, axis=2)[:, 3:9]).all()
    _, numbers = write_report(Path(request.out), tmp_path / "report.html", Asked())
    methods = json.loads(numbers.read_text())["methods"]
    assert "restored to voxels of 50 × 5 × 5 nm" in methods and "copied" not in methods
