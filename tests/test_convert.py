"""emdvol convert: equal voxels, a right pyramid, and nothing half-made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ome_zarr_models
import pytest
import tifffile
import zarr
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.stores import convert as module
from emdiffuse_vol.stores import copying
from emdiffuse_vol.stores.convert import convert, shard_for
from emdiffuse_vol.stores.image import write_units
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.pyramid import downsample

SIZE = (40.0, 8.0, 4.0)


def greys(shape: tuple[int, ...], dtype: str = "uint8") -> NDArray[Any]:
    return np.random.default_rng(1).integers(0, 250, shape).astype(dtype)


def stack(path: Path, data: NDArray[Any]) -> Path:
    tifffile.imwrite(path, data, photometric="minisblack")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def refused(result: Result, expected: str) -> None:
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert expected in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("Error: ")]) == 1
    assert "Traceback" not in result.output


def everything(path: Path, level: int = 0) -> NDArray[Any]:
    volume = open_volume(path, level=level)
    return volume.read(Box.of(volume.spec.shape))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_tiff_becomes_a_valid_image_with_equal_voxels(tmp_path: Path, dtype: str) -> None:
    data = greys((7, 33, 70), dtype)
    source, out = stack(tmp_path / "in.tif", data), tmp_path / "out.zarr"
    result = run(source, out, "--voxel-size", "40,8,4", "--chunk", "8,16,16")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(everything(out), data)
    spec = open_volume(out).spec
    assert (spec.voxel_size, spec.chunk, spec.dtype) == (SIZE, (8, 16, 16), dtype)
    assert type(ome_zarr_models.open_ome_zarr(str(out), version="0.5")).__name__ == "Image"
    np.testing.assert_array_equal(np.asarray(zarr.open_group(out, mode="r")["0"]), data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.tif", "out.zarr"]
    made: Any = zarr.open_group(out, mode="r").attrs["emdvol"]
    assert made["source"]["format"] == "TIFF"
    assert "emdiffuse_vol" in made["software"]


# Not narrower than 2: tifffile writes [z, y, 1] as [1, z, y].
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(2, 40)),
    st.tuples(*[st.sampled_from([4, 8, 16])] * 3),
    st.sampled_from([1, 3000]),
)
@settings(max_examples=8, deadline=None)
def test_any_shape_chunk_and_band_gives_the_same_voxels_and_pyramid(
    tmp_path_factory: pytest.TempPathFactory, shape: Triple, chunk: Triple, band: int
) -> None:
    folder = tmp_path_factory.mktemp("convert")
    data = greys(shape, "uint16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "BAND_BYTES", band)
        patch.setattr(module, "SHARD_EDGE", 16)
        patch.setattr(module, "pyramid_shapes", lambda shape: full_pyramid(shape, smallest=8))
        calls: list[tuple[int, int]] = []
        volume = open_volume(stack(folder / "in.tif", data), voxel_size=SIZE)
        convert(volume, folder / "out.zarr", chunk=chunk, progress=lambda *step: calls.append(step))
    level, expected = 0, data
    while True:
        np.testing.assert_array_equal(everything(folder / "out.zarr", level), expected)
        if max(expected.shape) <= 8:
            break
        level, expected = level + 1, downsample(expected)
    assert [done for done, _ in calls] == list(range(calls[-1][1] + 1))


def full_pyramid(shape: Triple, smallest: int) -> list[Triple]:
    from emdiffuse_vol.stores.pyramid import pyramid_shapes

    return pyramid_shapes(shape, smallest)


def test_every_shard_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[Box] = []

    def write(array: Any, box: Box, block: NDArray[Any]) -> Any:
        boxes.append(box)
        return write_units(array, box, block)

    monkeypatch.setattr(module, "write_units", write)
    monkeypatch.setattr(module, "SHARD_EDGE", 16)
    shape = (9, 40, 70)
    convert(
        open_volume(stack(tmp_path / "in.tif", greys(shape)), voxel_size=SIZE), tmp_path / "out.zarr", chunk=(8, 8, 8)
    )
    assert len(boxes) == len(set(boxes))
    assert sum(box.size for box in boxes) == np.prod(shape)


@pytest.mark.parametrize(
    ("shape", "chunk", "shard"),
    [
        ((1000, 5000, 5000), (64, 64, 64), (256, 256, 256)),
        ((20, 100, 5000), (64, 64, 64), (64, 128, 256)),
        ((1000, 5000, 5000), (16, 500, 100), (256, 500, 200)),
    ],
)
def test_shards_are_whole_chunks_and_no_larger_than_the_volume_needs(
    shape: Triple, chunk: Triple, shard: Triple
) -> None:
    assert shard_for(shape, chunk) == shard


def test_metadata_and_level_of_ome_zarr_survive(tmp_path: Path) -> None:
    data = greys((6, 40, 300))
    source = tmp_path / "first.zarr"
    assert run(stack(tmp_path / "in.tif", data), source, "--voxel-size", "40,8,4").exit_code == 0
    assert run(source, tmp_path / "again.zarr", "--level", "1").exit_code == 0
    again = open_volume(tmp_path / "again.zarr").spec
    coarse = open_volume(source, level=1).spec
    assert (again.voxel_size, again.origin) == (coarse.voxel_size, coarse.origin) == ((80, 16, 8), (20, 4, 2))
    np.testing.assert_array_equal(everything(tmp_path / "again.zarr"), everything(source, 1))


def test_outputs_of_different_inputs_have_different_identities(tmp_path: Path) -> None:
    identities = []
    for name in ("a", "b"):
        source = stack(tmp_path / f"{name}.tif", greys((3, 9, 9)))
        convert(open_volume(source, voxel_size=SIZE), tmp_path / f"{name}.zarr")
        identities.append(open_volume(tmp_path / f"{name}.zarr").spec.identity)
    assert identities[0] != identities[1]


def test_an_existing_output_is_kept_without_overwrite(tmp_path: Path) -> None:
    old, new = greys((3, 9, 9)), greys((4, 9, 9))
    out = tmp_path / "out.zarr"
    assert run(stack(tmp_path / "old.tif", old), out, "--voxel-size", "1,1,1").exit_code == 0
    stack(tmp_path / "new.tif", new)
    refused(run(tmp_path / "new.tif", out, "--voxel-size", "1,1,1"), "exists; choose another place or give --overwrite")
    np.testing.assert_array_equal(everything(out), old)
    assert run(tmp_path / "new.tif", out, "--voxel-size", "1,1,1", "--overwrite").exit_code == 0
    np.testing.assert_array_equal(everything(out), new)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.tif", "old.tif", "out.zarr"]


def test_overwrite_spares_what_is_not_a_zarr(tmp_path: Path) -> None:
    source = stack(tmp_path / "in.tif", greys((3, 9, 9)))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("ten years")
    refused(run(source, tmp_path / "thesis", "--voxel-size", "1,1,1", "--overwrite"), "is not a Zarr")
    assert (tmp_path / "thesis/chapter.tex").read_text() == "ten years"


def test_a_volume_can_replace_itself(tmp_path: Path) -> None:
    data, out = greys((5, 20, 30)), tmp_path / "v.zarr"
    assert run(stack(tmp_path / "in.tif", data), out, "--voxel-size", "40,8,4").exit_code == 0
    assert run(out, out, "--overwrite", "--chunk", "4,8,8").exit_code == 0
    assert open_volume(out).spec.chunk == (4, 8, 8)
    np.testing.assert_array_equal(everything(out), data)


def test_a_broken_conversion_leaves_nothing(tmp_path: Path) -> None:
    for z in range(3):
        tifffile.imwrite(tmp_path / f"s_{z}.tif", greys((64, 64)), compression="zlib")
    volume = open_volume(tmp_path, voxel_size=SIZE)
    file = tmp_path / "s_2.tif"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"s_2\.tif is damaged"):
        convert(volume, tmp_path / "out" / "v.zarr")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_conversion_left_is_cleared(tmp_path: Path) -> None:
    data = greys((3, 9, 9))
    left = tmp_path / ".out.zarr.partial"
    left.mkdir()
    (left / "zarr.json").write_text("{}")
    convert(open_volume(stack(tmp_path / "in.tif", data), voxel_size=SIZE), tmp_path / "out.zarr")
    assert not left.exists()
    np.testing.assert_array_equal(everything(tmp_path / "out.zarr"), data)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("missing.tif", ["--voxel-size", "1,1,1"], "does not exist"),
        ("in.tif", [], "give --voxel-size Z,Y,X in nanometres"),
        ("in.tif", ["--voxel-size", "1,1,1", "--level", "1"], "has no level 1"),
        ("text.tif", [], "is not a TIFF file"),
        ("empty", [], "neither Zarr metadata nor TIFF files"),
        ("double.tif", ["--voxel-size", "1,1,1"], "holds float64"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    tmp_path: Path, name: str, arguments: list[str], expected: str
) -> None:
    stack(tmp_path / "in.tif", greys((3, 9, 9)))
    stack(tmp_path / "double.tif", greys((3, 9, 9), "float64"))
    (tmp_path / "text.tif").write_text("no TIFF")
    (tmp_path / "empty").mkdir()
    refused(run(tmp_path / name, tmp_path / "out" / "v.zarr", *arguments), expected)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    source = stack(tmp_path / "in.tif", greys((3, 9, 9)))
    refused(run(source, source / "v.zarr", "--voxel-size", "1,1,1"), "cannot be written")
    refused(run(source, "s3://bucket/v.zarr", "--voxel-size", "1,1,1"), "expected a local path")


@pytest.mark.parametrize("value", ["1,2", "1,2,x", "0,1,1", "1,1,nan", "1,1,inf"])
def test_a_wrong_triple_is_refused(tmp_path: Path, value: str) -> None:
    result = run(tmp_path / "in.tif", tmp_path / "v.zarr", "--voxel-size", value)
    assert result.exit_code == 2
    assert "expected three positive numbers Z,Y,X" in result.output


@pytest.mark.parametrize("command", ["convert", "info"])
def test_help_imports_nothing_heavy(command: str) -> None:
    script = (
        "import sys; from emdiffuse_vol.cli.main import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit: print({'torch', 'dask', 'tensorstore', 'tifffile', 'zarr'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "Usage:" in done.stdout
