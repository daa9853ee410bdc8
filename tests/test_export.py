"""emdvol export: the same voxels and voxel size in every format, also for other readers; nothing half-made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import ome_zarr_models
import pytest
import tensorstore as ts
import tifffile
import zarr
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from volumes import run as run_engine
from volumes import small_request

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.errors import GeometryError, InputError, OutputError
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.stores import convert as convert_module
from emdiffuse_vol.stores import copying
from emdiffuse_vol.stores import export as module
from emdiffuse_vol.stores.export import export, format_of
from emdiffuse_vol.stores.image import create_image, write_array
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.pyramid import downsample
from emdiffuse_vol.stores.region import region_of
from emdiffuse_vol.stores.volume import DTYPES

SIZE = (40.0, 8.0, 4.0)
NAMES = {
    "tiff": "out.tif",
    "tiff-series": "series",
    "hdf5": "out.h5",
    "n5": "out.n5",
    "precomputed": "out.precomputed",
    "ome-zarr": "out.zarr",
    "ome-zarr-0.4": "old.zarr",
}
PYRAMIDS = ("n5", "precomputed", "ome-zarr", "ome-zarr-0.4")


def greys(shape: tuple[int, ...], dtype: str = "uint8") -> NDArray[Any]:
    return np.random.default_rng(1).integers(0, 250, shape).astype(dtype)


def volume_of(path: Path, data: NDArray[Any], origin: tuple[float, float, float] = (0, 0, 0)) -> Any:
    write_array(path, data, SIZE, chunk=(8, 16, 16), origin=origin)
    return open_volume(path)


def reconstruction(path: Path, data: NDArray[Any]) -> Path:
    """[2, z, y, x] as `emdvol reconstruct` names its channels."""
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    channels = [{"label": k, "color": "FFFFFF", "window": window, "active": True} for k in ("mean", "uncertainty")]
    write_array(
        path,
        data,
        SIZE,
        axes="czyx",
        chunk=(2, 8, 8, 8),
        omero={"channels": channels},
        attributes={"emdvol": {"uncertainty": {"channel": 1, "step": 0.125}}},
    )
    return path


def everything(path: Path, level: int = 0) -> NDArray[Any]:
    volume = open_volume(path, level=level)
    return volume.read(Box.of(volume.spec.shape))


def foreign(path: Path, format: str) -> NDArray[Any]:
    """[z, y, x] as another library reads it."""
    if format == "tiff":
        return tifffile.imread(path)
    if format == "tiff-series":
        return np.stack([tifffile.imread(file) for file in sorted(path.iterdir())])
    if format == "hdf5":
        with h5py.File(path) as file:
            return file["volume"][:]
    if format in ("ome-zarr", "ome-zarr-0.4"):
        return np.asarray(zarr.open_group(path, mode="r")["0"])
    driver, inner = ("n5", path / "s0") if format == "n5" else ("neuroglancer_precomputed", path)
    array = ts.open({"driver": driver, "kvstore": {"driver": "file", "path": f"{inner}/"}}, open=True).result()
    return array.read().result().squeeze().T


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", NAMES)
def test_every_format_holds_the_same_voxels(tmp_path: Path, format: str, dtype: str) -> None:
    data = greys((9, 70, 90), dtype)
    source, target = volume_of(tmp_path / "in.zarr", data), tmp_path / NAMES[format]
    calls: list[tuple[int, int]] = []
    export(source, target, format, progress=lambda *step: calls.append(step))
    spec = open_volume(target).spec
    assert (spec.shape, spec.dtype) == (data.shape, dtype)
    assert spec.voxel_size == pytest.approx(SIZE)
    np.testing.assert_array_equal(everything(target), data)
    np.testing.assert_array_equal(foreign(target, format), data)
    assert [done for done, _ in calls] == list(range(calls[-1][1] + 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.zarr", NAMES[format]])


@pytest.mark.parametrize("format", NAMES)
def test_bands_and_units_do_not_show(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = greys((20, 33, 47), "uint16")
    source = volume_of(tmp_path / "in.zarr", data)
    monkeypatch.setattr(copying, "BAND_BYTES", 3000)
    monkeypatch.setattr(convert_module, "SHARD_EDGE", 16)
    monkeypatch.setattr(module, "CHUNK", (8, 16, 8))
    export(source, tmp_path / NAMES[format], format)
    np.testing.assert_array_equal(everything(tmp_path / NAMES[format]), data)


@pytest.mark.parametrize("format", PYRAMIDS)
def test_folders_have_a_pyramid(tmp_path: Path, format: str) -> None:
    data = greys((5, 40, 530))
    target = tmp_path / NAMES[format]
    export(volume_of(tmp_path / "in.zarr", data), target, format)
    expected = data
    for level in range(3):
        spec = open_volume(target, level=level).spec
        assert spec.voxel_size == pytest.approx(tuple(s * 2**level for s in SIZE))
        np.testing.assert_array_equal(everything(target, level), expected)
        expected = downsample(expected)
    with pytest.raises(InputError, match="level"):
        open_volume(target, level=3)


@pytest.mark.parametrize(("format", "version"), [("ome-zarr", "0.5"), ("ome-zarr-0.4", "0.4")])
def test_ome_zarr_is_valid(tmp_path: Path, format: str, version: Any) -> None:
    target = tmp_path / NAMES[format]
    export(volume_of(tmp_path / "in.zarr", greys((5, 40, 300)), (400, 0, 7)), target, format)
    assert type(ome_zarr_models.open_ome_zarr(str(target), version=version)).__name__ == "Image"
    assert open_volume(target).spec.origin == (400, 0, 7)


@pytest.mark.parametrize("format", ["hdf5", "n5", "precomputed", "ome-zarr-0.4", "tiff"])
def test_a_region_keeps_its_place(tmp_path: Path, format: str) -> None:
    data = greys((9, 30, 40))
    source, target = volume_of(tmp_path / "in.zarr", data), tmp_path / NAMES[format]
    assert run(tmp_path / "in.zarr", target, "--format", format, "--roi", "2:7,10:30,5:25").exit_code == 0
    np.testing.assert_array_equal(everything(target), data[2:7, 10:30, 5:25])
    if format in ("hdf5", "precomputed", "ome-zarr-0.4"):
        assert open_volume(target).spec.origin == (2 * 40, 10 * 8, 5 * 4)
    for box in (Box((2, 0, 0), (2, 9, 9)), Box((0, 0, 0), (10, 9, 9)), Box((-1, 0, 0), (3, 9, 9))):
        with pytest.raises(GeometryError, match="is not inside the volume's shape"):
            region_of(source, box)


def test_channels_of_a_reconstruction(tmp_path: Path) -> None:
    data = greys((2, 6, 20, 30))
    source = reconstruction(tmp_path / "iso.zarr", data)
    for name, options, expected in (
        ("a.tif", [], data[0]),
        ("b.tif", ["--channel", "mean"], data[0]),
        ("c.tif", ["--channel", "uncertainty"], data[1]),
        ("d.tif", ["--channel", "1"], data[1]),
    ):
        result = run(source, tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        np.testing.assert_array_equal(tifffile.imread(tmp_path / name), expected)
        assert ("stored value x 0.125" in result.output) == (expected is data[1] or np.array_equal(expected, data[1]))
    result = run(source, tmp_path / "e.tif", "--channel", "phase")
    assert result.exit_code == 1
    assert "has no channel called phase (mean, uncertainty)" in result.output
    assert not (tmp_path / "e.tif").exists()


def test_a_level_is_exported(tmp_path: Path) -> None:
    data = greys((6, 40, 300))
    export(volume_of(tmp_path / "in.zarr", data), tmp_path / "p.zarr", "ome-zarr")
    assert run(tmp_path / "p.zarr", tmp_path / "out.tif", "--level", "1").exit_code == 0
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), downsample(data))
    assert open_volume(tmp_path / "out.tif").spec.voxel_size == pytest.approx((80, 16, 8))


def test_a_named_dataset_of_hdf5(tmp_path: Path) -> None:
    volume_of(tmp_path / "in.zarr", greys((3, 9, 11)))
    assert run(tmp_path / "in.zarr", f"{tmp_path}/out.h5:/volumes/raw").exit_code == 0
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["volumes/raw"].attrs["element_size_um"] == pytest.approx([0.04, 0.008, 0.004])


def test_jpeg_is_near_and_for_bytes_only(tmp_path: Path) -> None:
    data = np.broadcast_to(np.arange(60, dtype=np.uint8), (5, 50, 60)).copy()
    source = volume_of(tmp_path / "in.zarr", data)
    export(source, tmp_path / "p", "precomputed", jpeg=True)
    assert np.abs(everything(tmp_path / "p").astype(int) - data).max() < 8
    assert json.loads((tmp_path / "p/info").read_text())["scales"][0]["encoding"] == "jpeg"
    wide = volume_of(tmp_path / "wide.zarr", greys((3, 9, 9), "uint16"))
    for volume, format in ((wide, "precomputed"), (source, "n5")):
        with pytest.raises(OutputError, match="jpeg is for uint8"):
            export(volume, tmp_path / "q", format, jpeg=True)


@pytest.mark.parametrize("format", NAMES)
def test_only_a_volume_of_the_same_format_is_replaced(tmp_path: Path, format: str) -> None:
    old, new, target = greys((3, 9, 9)), greys((4, 9, 9)), tmp_path / NAMES[format]
    export(volume_of(tmp_path / "old_in.zarr", old), target, format)
    source = volume_of(tmp_path / "new_in.zarr", new)
    with pytest.raises(OutputError, match="exists; choose another place or give --overwrite"):
        export(source, target, format)
    np.testing.assert_array_equal(everything(target), old)
    export(source, target, format, overwrite=True)
    np.testing.assert_array_equal(everything(target), new)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("ten years")
    (tmp_path / "letter").write_text("dear")
    for precious in (thesis, tmp_path / "letter"):
        with pytest.raises(OutputError, match="so it is not overwritten"):
            export(source, precious, format, overwrite=True)
    assert (thesis / "chapter.tex").read_text() == "ten years"
    assert (tmp_path / "letter").read_text() == "dear"


@pytest.mark.parametrize("format", NAMES)
def test_a_broken_export_leaves_nothing(tmp_path: Path, format: str) -> None:
    source = volume_of(tmp_path / "in.zarr", greys((20, 30, 30)))
    next(f for f in (tmp_path / "in.zarr/0/c").rglob("*") if f.is_file()).write_bytes(b"torn")
    with pytest.raises(InputError, match=r"chunk .* is damaged"):
        export(source, tmp_path / "out" / NAMES[format], format)
    assert list((tmp_path / "out").iterdir()) == []


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    volume_of(tmp_path / "in.zarr", greys((3, 9, 9)))
    for arguments, expected in (
        ((tmp_path / "in.zarr", tmp_path / "out"), "give --format tiff|tiff-series|hdf5"),
        ((tmp_path / "in.zarr", "s3://bucket/v.n5"), "is a URL, expected a local path"),
        ((tmp_path / "in.zarr", tmp_path / "o.tif", "--roi", "1:2"), "is not of the form"),
        ((tmp_path / "in.zarr", tmp_path / "o.tif", "--roi", "0:9,0:9,0:9"), "is not inside"),
        ((tmp_path / "no.zarr", tmp_path / "o.tif"), "does not exist"),
        ((tmp_path / "in.zarr", tmp_path / "in.zarr/zarr.json/o.tif"), "cannot be written"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert expected in result.output
        assert len([line for line in result.output.splitlines() if line.startswith("Error: ")]) == 1
        assert "Traceback" not in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.zarr"]


def test_convert_writes_what_the_suffix_says(tmp_path: Path) -> None:
    data = greys((5, 20, 30))
    volume_of(tmp_path / "a.zarr", data)
    chain = ["a.zarr", "b.tif", "c.h5", "d.n5", "e.precomputed", "f.zarr"]
    for source, out in pairwise(chain):
        result = CliRunner().invoke(main, ["convert", str(tmp_path / source), str(tmp_path / out)])
        assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(everything(tmp_path / "f.zarr"), data)
    assert open_volume(tmp_path / "f.zarr").spec.voxel_size == pytest.approx(SIZE)


@pytest.mark.parametrize("name", ["in.h5", "in.n5", "in.precomputed", "in.tif"])
def test_a_run_does_not_see_the_format(tmp_path: Path, name: str) -> None:
    request = small_request(tmp_path, roi="0:4,0:60,0:60")
    expected = run_engine(request)
    export(open_volume(request.input), tmp_path / name, str(format_of(name)))
    found = run_engine(replace(request, input=str(tmp_path / name), out=str(tmp_path / "other.zarr")))
    np.testing.assert_array_equal(found, expected)
    for channel, codes in zip(("mean", "uncertainty"), found, strict=True):
        out = tmp_path / f"{channel}{Path(name).suffix}"
        assert run(tmp_path / "other.zarr", out, "--channel", channel).exit_code == 0
        np.testing.assert_array_equal(everything(out), codes)


# Going on after a kill

SLOW = """
import sys, time
from emdiffuse_vol.stores import convert, copying, export
from emdiffuse_vol.stores.opening import open_volume
copying.BAND_BYTES, convert.SHARD_EDGE, export.CHUNK = 1, 8, (8, 8, 8)
volume = open_volume(sys.argv[1])
read = volume.read
def slowly(box):
    time.sleep(0.01 if len(sys.argv) > 4 else 0)
    print(box, flush=True)
    return read(box)
volume.read = slowly
export.export(volume, sys.argv[2], sys.argv[3])
"""


@pytest.mark.parametrize("format", [f for f in NAMES if f not in ("tiff", "hdf5")])
def test_a_killed_export_goes_on(tmp_path: Path, format: str) -> None:
    data = greys((24, 40, 40))
    volume_of(tmp_path / "in.zarr", data)
    target = tmp_path / NAMES[format]
    command = [sys.executable, "-c", SLOW, str(tmp_path / "in.zarr"), str(target), format]
    with subprocess.Popen([*command, "slow"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(40):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    assert not target.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0 < len(done.stdout.splitlines()) < 75 - 30  # of 75 units
    np.testing.assert_array_equal(everything(target), data)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.zarr", target.name])
    assert not (target / ".emdvol-copy.json").exists()


def test_what_another_export_left_is_not_gone_on_with(tmp_path: Path) -> None:
    first, second = (
        volume_of(tmp_path / "a.zarr", greys((8, 20, 20))),
        volume_of(tmp_path / "b.zarr", greys((8, 20, 21))),
    )
    left = tmp_path / ".out.n5.partial"
    export(first, left, "n5")
    (left / ".emdvol-copy.json").write_text(json.dumps({"key": "another", "bands": [1]}))
    export(second, tmp_path / "out.n5", "n5")
    np.testing.assert_array_equal(everything(tmp_path / "out.n5"), greys((8, 20, 21)))
    assert not left.exists()


@pytest.mark.parametrize("format", ["tiff", "tiff-series", "hdf5", "precomputed"])
def test_memory_does_not_grow_with_the_volume(tmp_path: Path, format: str) -> None:
    """Peaks of processes that export 4 MB and 64 MB."""
    script = (
        "import sys, resource\n"
        "from emdiffuse_vol.stores import convert, copying\n"
        "from emdiffuse_vol.stores.export import export\n"
        "from emdiffuse_vol.stores.opening import open_volume\n"
        "copying.BAND_BYTES, convert.SHARD_EDGE = 2 << 20, 64\n"
        "export(open_volume(sys.argv[1]), sys.argv[2], sys.argv[3])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    peaks = []
    for depth in (16, 256):
        command = [sys.executable, "-c", script, empty(tmp_path / f"{depth}.zarr", (depth, 512, 512))]
        command += [tmp_path / f"out-{depth}", format]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 30, peaks


def empty(path: Path, shape: Triple) -> Path:
    if not path.exists():
        create_image(str(path), shape=shape, dtype="uint8", voxel_size=SIZE, chunk=(64, 64, 64))
    return path
