"""Damaged and hostile volumes of every format: an InputError or greys, never anything else.

Each format has a process of its own with little memory, in which volumes are broken in seeded ways, opened, surveyed
and read. It prints a line for each case before it begins, so that a crash names the case. What is checked: no other
exception, no hang, no memory for what is only declared, no file written or removed, and greys of the declared shape.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tensorstore as ts
import tifffile
import zarr
from click.testing import CliRunner
from numpy.typing import NDArray

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.export import export
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.survey import survey

CASES = int(os.environ.get("EMDVOL_FUZZ_CASES", "16"))  # of each format
SECONDS = 10  # for a case
ADDRESSES = 8 << 30  # bytes of address space: threads reserve some, the declared shapes would take terabytes
GROWTH = 300  # MB of real memory over all cases
SHAPE = (12, 20, 24)
SIZE = (40.0, 8.0, 4.0)
ANOTHER = [0, -1, 2**31, 2**62, 10**30, 1.5, "", "../../secret", "/etc/passwd", None, [], {}, [1] * 40, True, "uint64"]


def greys() -> NDArray[Any]:
    return np.random.default_rng(0).integers(1, 250, SHAPE, dtype=np.uint8)


def _ome(path: Path, format: str) -> Path:
    write_tiff(path.with_suffix(".tif"))
    export(open_volume(path.with_suffix(".tif"), voxel_size=SIZE), path, format)
    path.with_suffix(".tif").unlink()
    return path


def write_tiff(path: Path, **options: Any) -> Path:
    tifffile.imwrite(path, greys(), photometric="minisblack", **options)
    return path


def write_series(path: Path) -> Path:
    path.mkdir()
    for z, section in enumerate(greys()[:4]):
        tifffile.imwrite(path / f"{z}.tif", section, compression="zlib" if z % 2 else None)
    return path


def write_hdf5(path: Path, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("volumes/raw", data=greys(), **options).attrs["resolution"] = SIZE
    return path


def write_mrc(path: Path) -> Path:
    import mrcfile

    with mrcfile.new(path) as file:
        file.set_data(greys().astype(np.int16))
    return path


def write_plain(path: Path) -> Path:
    zarr.create_array(path, data=greys(), chunks=(4, 8, 8))
    return path


def write_jpeg(path: Path) -> Path:
    kvstore = {"driver": "file", "path": f"{path}/"}
    scale = {"size": SHAPE[::-1], "chunk_size": [8, 8, 8], "encoding": "jpeg", "resolution": SIZE[::-1]}
    multiscale = {"type": "image", "data_type": "uint8", "num_channels": 1}
    spec = {"driver": "neuroglancer_precomputed", "kvstore": kvstore}
    store = ts.open(spec | {"multiscale_metadata": multiscale, "scale_metadata": scale}, create=True).result()
    store.write(greys().T[..., None]).result()
    return path


def write_spec(path: Path) -> Path:
    write_plain(path.with_name("inner.zarr"))
    kvstore = {"driver": "file", "path": f"{path.with_name('inner.zarr')}/"}
    transform = {"input_labels": ["z", "y", "x"], "input_inclusive_min": [0, 0, 0], "input_exclusive_max": SHAPE}
    path.write_text(json.dumps({"driver": "zarr3", "kvstore": kvstore, "transform": transform}))
    return path


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "ome-zarr-0.5": ("v.zarr", lambda path: _ome(path, "ome-zarr")),
    "ome-zarr-0.4": ("v.zarr", lambda path: _ome(path, "ome-zarr-0.4")),
    "zarr": ("v.zarr", write_plain),
    "n5": ("v.n5", lambda path: _ome(path, "n5")),
    "precomputed": ("v", lambda path: _ome(path, "precomputed")),
    "precomputed-jpeg": ("v", write_jpeg),
    "tensorstore": ("v.json", write_spec),
    "hdf5": ("v.h5", write_hdf5),
    "hdf5-gzip": ("v.h5", lambda path: write_hdf5(path, chunks=(4, 8, 8), compression="gzip")),
    "mrc": ("v.mrc", write_mrc),
    "tiff": ("v.tif", write_tiff),
    "tiff-zlib-tiles": ("v.tif", lambda path: write_tiff(path, tile=(16, 16), compression="zlib", predictor=True)),
    "tiff-lzw": ("v.tif", lambda path: write_tiff(path, compression="lzw")),
    "tiff-ome": ("v.tif", lambda path: write_tiff(path, ome=True, metadata={"axes": "ZYX"})),
    "tiff-imagej": ("v.tif", lambda path: write_tiff(path, imagej=True, truncate=True, metadata={"axes": "ZYX"})),
    "tiff-big": ("v.tif", lambda path: write_tiff(path, bigtiff=True, compression="zlib")),
    "tiff-series": ("v", write_series),
}
HEADER = 1200  # bytes at either end of a file, where its metadata are


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def is_json(file: Path) -> bool:
    return file.suffix == ".json" or file.name in ("info", ".zattrs", ".zarray", ".zgroup")


def mutate(folder: Path, rng: random.Random) -> str:
    """Breaks one file; says how. JSON is broken as JSON two times out of three."""
    files = files_of(folder)
    texts = [file for file in files if is_json(file)]
    file = rng.choice(texts if texts and rng.random() < 0.7 else files)
    if is_json(file) and rng.random() < 0.9:
        return f"{file.name}: {mutate_json(file, rng)}"
    content = bytearray(file.read_bytes())
    way = rng.choice(["truncated", "emptied", "flipped", "scribbled", "filled"])
    place = rng.choice([rng.randrange(HEADER), len(content) - 1 - rng.randrange(HEADER), rng.randrange(1 << 30)])
    place %= len(content)
    if way == "truncated":
        del content[place:]
    elif way == "emptied":
        content.clear()
    elif way == "flipped":
        content[place] ^= 1 << rng.randrange(8)
    else:
        junk = rng.randbytes(8) if way == "scribbled" else bytes([rng.choice([0, 255])]) * 8
        content[place : place + 8] = junk[: len(content) - place]
    file.write_bytes(content)
    return f"{file.name} {way} at {place}"


def mutate_json(file: Path, rng: random.Random) -> str:
    """Puts something else in the place of a value anywhere inside, or removes it."""
    root = json.loads(file.read_text())
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(root)
    node, key = rng.choice(places)
    value = rng.choice([*ANOTHER, "remove", "deep"])
    if value == "remove":
        del node[key]
    else:
        node[key] = "DEEP" if value == "deep" else value
    deep = "[" * 100_000 + "]" * 100_000
    file.write_text(json.dumps(root).replace('"DEEP"', deep))
    return f"{key} = {value!r}"


def look(url: Path) -> str:
    """Opens, surveys and reads a volume. -> what came of it."""
    try:
        volume = open_volume(url, voxel_size=SIZE)
        shape = volume.spec.shape
        survey(volume)
        near = Box.of(shape) & Box.of((16, 32, 32))
        far = Box((shape[0] - 1, shape[1] - 1, shape[2] - 1), shape)
        for box in (near, far):
            found = volume.read(box)
            assert (found.shape, found.dtype) == (box.shape, volume.spec.dtype)
    except InputError as error:
        assert "\n" not in str(error), error
        return "refused"
    return "read"


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def fuzz(name: str, folder: Path) -> None:
    """All cases of a format. -> counts as the last line, on standard output."""
    file, write = WRITERS[name]
    (folder / "secret").write_text("nobody reads this")
    assert look(write_into(folder / "sound", file, write)) == "read"
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    signal.signal(signal.SIGALRM, hang)
    before, counts = peak(), {"read": 0, "refused": 0}
    for seed in range(CASES):
        place = folder / "deep" / "er" / "case"
        shutil.copytree(folder / "sound", place)
        if name == "tensorstore":
            (place / file).write_text((place / file).read_text().replace("/sound/", "/deep/er/case/"))
        how = mutate(place, random.Random(f"{name} {seed}"))
        print(f"case {seed}: {how}", flush=True)
        there = [(f, f.stat().st_size) for f in files_of(folder)]
        signal.alarm(SECONDS)
        counts[look(place / file)] += 1
        signal.alarm(0)
        assert [(f, f.stat().st_size) for f in files_of(folder)] == there, "files have changed"
        assert peak() - before < GROWTH, f"{peak() - before} MB more"
        shutil.rmtree(place)
    print(json.dumps(counts))


def write_into(folder: Path, file: str, write: Callable[[Path], Path]) -> Path:
    folder.mkdir()
    return write(folder / file)


def hang(*_: Any) -> None:
    raise TimeoutError("the case hangs")


@pytest.mark.parametrize("name", WRITERS)
def test_a_broken_volume_is_refused_or_read(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-W", "ignore", __file__, name, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60 + CASES, cwd=tmp_path)
    assert done.returncode == 0, "\n".join([*done.stdout.splitlines()[-2:], *done.stderr.splitlines()[-25:]])
    counts = json.loads(done.stdout.splitlines()[-1])
    assert sum(counts.values()) == CASES
    assert counts["refused"] >= 3, "the mutations break too little to show anything"


@pytest.mark.parametrize("name", WRITERS)
def test_commands_say_one_line_and_leave_nothing(tmp_path: Path, name: str) -> None:
    """Every file of a volume cut to half its length."""
    file, write = WRITERS[name]
    url = write_into(tmp_path / "in", file, write)
    for part in files_of(tmp_path / "in"):
        os.truncate(part, part.stat().st_size // 2)
    there = files_of(tmp_path)
    for arguments in (["info", str(url)], ["convert", str(url), str(tmp_path / "out/v.zarr")]):
        result = CliRunner().invoke(main, [*arguments, "--voxel-size", "40,8,4"])
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        assert len([line for line in result.output.splitlines() if line.startswith("Error: ")]) == 1
        assert "Traceback" not in result.output
    assert files_of(tmp_path) == there


def test_a_damaged_tiff_is_one_line_also_for_the_eye(tmp_path: Path) -> None:
    """tifffile logs what it finds; nobody has asked."""
    url = write_tiff(tmp_path / "v.tif", ome=True, metadata={"axes": "ZYX"})
    os.truncate(url, url.stat().st_size // 2)
    command = [sys.executable, "-m", "emdiffuse_vol", "info", str(url), "--voxel-size", "40,8,4"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done.stderr


def test_there_are_enough_cases() -> None:
    assert CASES * len(WRITERS) >= 200


# Declared, not there: nothing is allocated for it.


def test_a_declared_chunk_without_measure_is_refused(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "v.zarr", shape=(4, 4, 4), chunks=(4, 4, 4), dtype="uint8")
    array[...] = 1
    file = tmp_path / "v.zarr/zarr.json"
    metadata = json.loads(file.read_text())
    metadata["shape"] = [1 << 20] * 3
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = [1 << 20] * 3
    file.write_text(json.dumps(metadata))
    with pytest.raises(InputError, match="expected at most 1; write it in smaller ones"):
        open_volume(tmp_path / "v.zarr", voxel_size=SIZE)


def test_a_declared_tiff_without_end_is_refused(tmp_path: Path) -> None:
    """A small strip that says it is a huge section."""
    for compression in (None, "zlib"):
        tifffile.imwrite(tmp_path / "v.tif", greys()[0], photometric="minisblack", compression=compression)
        with tifffile.TiffFile(tmp_path / "v.tif", mode="r+") as tif:
            for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
                tif.pages.first.tags[tag].overwrite(1 << 20)
        with pytest.raises(InputError, match=r"v\.tif"):
            volume = open_volume(tmp_path / "v.tif", voxel_size=SIZE)
            volume.read(Box.of((1, 4, 4)))


def test_nothing_is_run_that_a_file_brings(tmp_path: Path) -> None:
    """numpy objects are pickles: HDF5, Zarr and N5 that hold such are refused."""
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file.create_dataset("v", SHAPE, h5py.special_dtype(vlen=np.uint8))
    folder = tmp_path / "v.zarr"
    folder.mkdir()
    metadata = {"zarr_format": 2, "shape": SHAPE, "chunks": SHAPE, "dtype": "|O", "order": "C", "fill_value": 0}
    filters = {"filters": [{"id": "pickle"}], "compressor": None}
    (folder / ".zarray").write_text(json.dumps(metadata | filters))
    for path in (tmp_path / "v.h5", folder):
        with pytest.raises(InputError):
            open_volume(path, voxel_size=SIZE)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    fuzz(sys.argv[1], Path(sys.argv[2]))
