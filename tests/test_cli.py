"""The command line: help is quick, mistakes are one line, configuration and flags agree."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from networks import random_slab
from safetensors.torch import load_file, save_file
from volumes import read, small_request, smooth_volume, write_volume, write_weights

from emdiffuse_vol.cli.main import COMMANDS, main
from emdiffuse_vol.models.checkpoints import save_weights
from emdiffuse_vol.reconstruct import resources, run
from emdiffuse_vol.reconstruct.job import Request


def emdvol(*arguments: object) -> tuple[int, str]:
    """-> exit status, everything printed"""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback is a failure of ours
    return result.exit_code, result.output


def refused(*arguments: object, says: str) -> None:
    """The command ends in one line that says something, and leaves no output."""
    status, output = emdvol(*arguments)
    assert status != 0
    lines = [line for line in output.splitlines() if line.startswith("Error")]
    assert len(lines) == 1 and says in lines[0], output


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    write_weights(tmp_path / "w.safetensors")
    return write_volume(tmp_path / "in.zarr", smooth_volume((4, 40, 50)), (50, 10, 10))


def reconstruct(stack: Path, *more: object) -> list[object]:
    folder = stack.parent
    return ["reconstruct", stack, "--out", folder / "out.zarr", "--weights", folder / "w.safetensors", *more]


@pytest.mark.parametrize("command", [[], *[[name] for name in COMMANDS]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys; from emdiffuse_vol.cli.main import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'dask', 'zarr', 'tensorstore', 'tifffile', 'pydantic', 'skimage'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage" in shown.stdout


def test_importing_the_package_imports_neither_torch_nor_dask() -> None:
    code = "import sys, emdiffuse_vol; assert not {'torch', 'dask', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reconstruct_writes_an_isotropic_volume(stack: Path) -> None:
    status, output = emdvol(*reconstruct(stack))
    assert status == 0 and "is complete" in output
    codes = read(stack.parent / "out.zarr")
    assert codes.shape == (2, 16, 40, 50)
    assert (codes[0, ::5] == read(stack)).all()


def test_dry_run_prints_the_plan_and_writes_nothing(stack: Path) -> None:
    status, output = emdvol(*reconstruct(stack, "--dry-run"))
    assert status == 0
    for word in (
        "16 x 40 x 50",
        "10 x 10 x 10 nm",
        "overlap work",
        "FLOP per voxel",
        "memory",
        "disk",
        "blocks",
        "tiles",
    ):
        assert word in output
    assert not (stack.parent / "out.zarr").exists()
    status, output = emdvol(*reconstruct(stack, "--dry-run", "--json"))
    assert json.loads(output)["output"]["shape"] == [16, 40, 50]


def test_flops_of_the_plan_are_those_of_the_network(stack: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from emdiffuse_vol.reconstruct.predict import Tile

    prepared = run.prepare(small_request(stack.parent / "f"))
    predictor = prepared.predictor
    tile = Tile(
        predictor.tiling.input_box((0, 0, 0)),
        np.zeros((20, *predictor.tiling.shape[1:]), np.float32),
        np.arange(predictor.tiling.shape[0]) // 5 + 1,
        np.zeros(predictor.tiling.shape[0], np.float32),
    )
    with FlopCounterMode(display=False) as counter:
        predictor([tile])
    assert counter.get_total_flops() == predictor.flops()


def test_configuration_file_and_flags(stack: Path) -> None:
    config = stack.parent / "run.json"
    config.write_text(json.dumps({"input": str(stack), "members": 3, "seed": 9, "shard": [64, 64, 128]}))
    common = ["--weights", stack.parent / "w.safetensors", "--out", stack.parent / "o.zarr", "--dry-run", "--json"]
    status, output = emdvol("reconstruct", "--config", config, "--members", 2, *common)
    assert status == 0
    assert json.loads(output)["members"] == 2 and json.loads(output)["shard"] == [64, 64, 128]


def test_every_flag_has_a_key_and_every_key_a_flag() -> None:
    from emdiffuse_vol.cli.reconstruct import command

    flags = {param.name for param in command.params} - {"config", "dry_run", "as_json", "retry_failed"}
    assert flags == {field.name for field in fields(Request)}


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs").glob("vem*.json")), ids=lambda p: p.stem
)
def test_shipped_configurations_are_valid(path: Path) -> None:
    from emdiffuse_vol.config import load_request

    assert load_request(str(path), {"input": "in.zarr", "out": "out.zarr"}).weights


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"memebrs": 3}, "setting 'memebrs' is unknown"),
        ({"members": "many"}, "setting 'members'"),
        ([1], "expected an object"),
    ],
)
def test_bad_configuration_is_refused_with_its_path(stack: Path, settings, says) -> None:
    config = stack.parent / "bad.json"
    config.write_text(json.dumps(settings))
    refused(*reconstruct(stack, "--config", config), says=says)
    config.write_text("{")
    refused(*reconstruct(stack, "--config", config), says="is not JSON")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--mode", "vEMDiffuse-z"], "choose one of vEMDiffuse-i, vEMDiffuse-a"),
        (["--roi", "0:9,0:40,0:50"], "not inside the input, which is 0:4,0:40,0:50"),
        (["--roi", "zero"], "not of the form z0:z1,y0:y1,x0:x1"),
        (["--block", "96,64,64"], "use --block 128,64,64"),
        (["--shard", "60,64,64"], "use --shard 64,64,64"),
        (["--factor", "1"], "above 1"),
        (["--factor", "x"], "is not a number"),
        (["--factor", "5", "--target-voxel-size", "10"], "give one of them"),
        (["--voxel-size", "8,8,8"], "already as fine"),
        (["--voxel-size", "8,10,10"], "already as fine"),
        (["--members", "1"], "at least 2"),
        (["--workers", "0"], "at least 1"),
        (["--seed", "-1"], "0 to 2^64"),
        (["--sampler", "euler"], "choose one of ancestral"),
        (["--steps", "0"], "at least 1"),
        (["--device", "tpu"], "is not here"),
        (["--precision", "float64"], "choose one of auto, float32, bfloat16"),
        (["--tile", "3,3,3"], "is not a multiple"),
        (["--factor", "1e30"], "no plain number"),
        (["--target-voxel-size", "0.00001"], "is no size"),
        (["--factor", "2.5", "--roi", "1:2,0:40,0:50"], "holds no plane"),
        (["--out", "s3://bucket/iso.zarr"], "is a URL"),
        (["--executor", "cloud"], "choose one of local, dask"),
        (["--device", "cuda"], "finds no CUDA device"),
        (["--weights", "nowhere.safetensors"], "no weights nowhere.safetensors"),
        (["--voxel-size", "500,10,10"], "pixels apart"),
    ],
)
def test_mistakes_are_one_line(stack: Path, more, says) -> None:
    if more[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused(*reconstruct(stack, *more), says=says)
    assert not (stack.parent / "out.zarr").exists()


def test_missing_input_and_things_that_are_no_volume(tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    refused("reconstruct", tmp_path / "none.zarr", "--out", out, says="does not exist")
    (tmp_path / "folder.zarr").mkdir()
    refused("reconstruct", tmp_path / "folder.zarr", "--out", out, says="expected OME-Zarr")
    (tmp_path / "text.tif").write_text("no image")
    refused("reconstruct", tmp_path / "text.tif", "--out", out, says="not a TIFF")
    refused("reconstruct", "--out", out, says="'input' is missing")
    assert not out.exists()


def test_volume_without_voxel_size_or_depth(tmp_path: Path) -> None:
    import tifffile

    tifffile.imwrite(tmp_path / "stack.tif", smooth_volume((3, 20, 20)), photometric="minisblack")
    refused("reconstruct", tmp_path / "stack.tif", "--out", tmp_path / "o.zarr", says="--voxel-size")
    tifffile.imwrite(tmp_path / "one.tif", smooth_volume((1, 20, 20)))
    refused(
        *["reconstruct", tmp_path / "one.tif", "--out", tmp_path / "o.zarr", "--voxel-size", "50,10,10"],
        says="1 section",
    )


def test_the_input_is_never_an_output(stack: Path) -> None:
    for out in (stack, stack / "iso.zarr", stack.parent):
        refused("reconstruct", stack, "--out", out, "--overwrite", "--dry-run", says="in the input")


def test_overwrite_continues_what_already_has_these_settings(stack: Path) -> None:
    assert emdvol(*reconstruct(stack))[0] == 0
    before = (stack.parent / "out.zarr" / "zarr.json").stat().st_ino
    assert emdvol(*reconstruct(stack, "--overwrite"))[0] == 0
    assert (stack.parent / "out.zarr" / "zarr.json").stat().st_ino == before
    assert emdvol(*reconstruct(stack, "--overwrite", "--seed", 4))[0] == 0
    assert (stack.parent / "out.zarr" / "zarr.json").stat().st_ino != before
    assert not list(stack.parent.glob(".out*"))


def test_a_damaged_output_is_refused_in_one_line(stack: Path) -> None:
    assert emdvol(*reconstruct(stack))[0] == 0
    group = stack.parent / "out.zarr" / "zarr.json"
    attributes = json.loads(group.read_text())
    attributes["attributes"]["emdvol"]["sealed"] = False
    group.write_text(json.dumps(attributes))
    shutil.rmtree(stack.parent / "out.zarr" / "ledger" / "p99")
    refused(*reconstruct(stack), says="the ledger is damaged")
    group.write_text("[1]")
    refused(*reconstruct(stack), says="is no output of emdvol")


def test_weights_that_do_not_fit_say_how(stack: Path) -> None:
    path = stack.parent / "w.safetensors"
    state = load_file(path)
    del state["out.weight"]
    state["extra"] = torch.zeros(1)
    header = {"architecture": "slab", "config": '{"width": 8, "deep": 12}', "modes": '["vEMDiffuse-a"]'}
    save_file(state, path, header)
    refused(*reconstruct(stack), says="1 keys missing (first: out.weight), 1 unexpected (first: extra)")
    save_weights(path, random_slab(), architecture="slab", config={"width": 8, "deep": 12}, modes=["EMDiffuse-n"])
    refused(*reconstruct(stack), says="not vEMDiffuse-a")


def test_output_that_cannot_be_written_or_does_not_fit(stack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stack.parent / "file").write_text("")
    refused(*reconstruct(stack, "--out", stack.parent / "file" / "out.zarr"), says="cannot")
    usage = shutil.disk_usage(stack.parent)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(*reconstruct(stack), says="free some space")
    monkeypatch.undo()
    monkeypatch.setattr(resources, "available_memory", lambda: 10_000)
    refused(*reconstruct(stack), says="of memory")
    assert not (stack.parent / "out.zarr").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(stack: Path) -> None:
    locked = stack.parent / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    refused(*reconstruct(stack, "--out", locked / "out.zarr"), says="cannot write")


def test_damaged_input_chunk_is_named_and_the_run_continues_once_it_is_mended(stack: Path) -> None:
    chunk = next(p for p in (stack / "0").rglob("*") if p.is_file() and p.name != "zarr.json")
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    refused(*reconstruct(stack), says="is damaged")
    chunk.write_bytes(whole)
    assert emdvol(*reconstruct(stack))[0] == 0


def test_nan_in_a_float_input_is_named(tmp_path: Path) -> None:
    greys = smooth_volume((4, 40, 50), dtype="float32")
    greys[2, 7, 9] = np.nan
    write_weights(tmp_path / "w.safetensors")
    stack = write_volume(tmp_path / "in.zarr", greys, (50, 10, 10))
    refused(*reconstruct(stack), says="z=2, y=7, x=9")


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_other_dtypes_keep_their_greys(tmp_path: Path, dtype: str) -> None:
    greys = smooth_volume((4, 40, 50), dtype="float32") * 50 - (8000 if dtype == "int16" else 0)
    greys = greys.astype(dtype)
    write_weights(tmp_path / "w.safetensors")
    stack = write_volume(tmp_path / "in.zarr", greys, (50, 10, 10))
    assert emdvol(*reconstruct(stack))[0] == 0
    codes = read(tmp_path / "out.zarr")
    assert codes.dtype == dtype and (codes[0, ::5] == greys).all()
    low, high = float(greys.min()) - 2000, float(greys.max()) + 2000
    assert low < codes[0].min() and codes[0].max() < high


def test_mistyped_command_and_option_are_usage_errors() -> None:
    assert emdvol("recontruct")[0] == 2
    assert emdvol("reconstruct", "--membres", 3)[0] == 2


def test_what_is_mistyped_is_guessed() -> None:
    refused("recontruct", says="Did you mean 'reconstruct'?")
    refused("models", "lst", says="Did you mean 'list'?")
    refused("info", "v", "--jsn", says="Did you mean '--json'?")


def test_bash_completes_commands_and_options() -> None:
    complete = "COMPREPLY=(); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _emdvol_completion emdvol; echo ${COMPREPLY[@]}"
    lines = (
        'eval "$(emdvol completion bash)"',
        f"COMP_WORDS=(emdvol recon); {complete}",
        f"COMP_WORDS=(emdvol plan --pri); {complete}",
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shown = subprocess.run(
        ["bash", "-c", "\n".join(lines)], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["reconstruct", "--price"], shown.stderr


def test_quiet_draws_no_bars(tmp_path: Path) -> None:
    sample = ["sample", "--shape", "4,16,16", "--voxel-size", "8,8,8"]
    for flags, bars in (([], True), (["--quiet"], False)):
        shown = CliRunner().invoke(main, [*flags, *sample, str(tmp_path / f"{bars}.zarr")])
        assert shown.exit_code == 0 and "seed 0" in shown.stdout
        assert ("Sampling" in shown.stderr) is bars
