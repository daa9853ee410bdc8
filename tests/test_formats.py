"""Formats that other programs write: the same voxels and the same voxel size, whatever holds them."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import tensorstore as ts
import tifffile
import zarr
from numpy.typing import NDArray
from servers import Objects, local_s3, serving

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.stores.kvstore import AWS_CREDENTIALS
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.volume import DTYPES

SHAPE: Triple = (6, 10, 14)
SIZE = (40.0, 8.0, 4.0)
INNER = Box((1, 2, 3), (5, 9, 14))


def greys(shape: tuple[int, ...] = SHAPE, dtype: str = "uint8", seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(1, 250, shape).astype(dtype)


def kvstore(path: Path) -> dict[str, Any]:
    return {"driver": "file", "path": f"{path}/"}


def write_hdf5(path: Path, data: NDArray[Any], **attributes: Any) -> str:
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(
            "volumes/raw", data=data, chunks=tuple(min(4, n) for n in data.shape), compression="gzip"
        )
        dataset.attrs.update(attributes)
    return f"{path}:/volumes/raw"


def write_mrc(path: Path, data: NDArray[Any], size: tuple[float, float, float] | None = SIZE) -> str:
    """uint8 becomes uint16: mrcfile has no unsigned bytes."""
    with mrcfile.new(path) as file:
        file.set_data(data)
        if size is not None:
            file.voxel_size = tuple(10 * s for s in reversed(size))
    return str(path)


def write_n5(path: Path, data: NDArray[Any], **attributes: Any) -> str:
    metadata = {"dimensions": data.T.shape, "blockSize": [4] * data.ndim, "dataType": data.dtype.name}
    spec = {"driver": "n5", "kvstore": kvstore(path), "metadata": metadata | {"compression": {"type": "gzip"}}}
    ts.open(spec, create=True).result().write(data.T).result()
    if attributes:
        file = path / "attributes.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | attributes))
    return str(path)


def write_precomputed(path: Path, data: NDArray[Any], encoding: str = "raw", **scale: Any) -> str:
    z, y, x = data.shape
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": kvstore(path),
        "multiscale_metadata": {"type": "image", "data_type": data.dtype.name, "num_channels": 1},
        "scale_metadata": {
            "size": [x, y, z],
            "chunk_size": [4, 4, 4],
            "encoding": encoding,
            "resolution": list(reversed(SIZE)),
        }
        | scale,
    }
    ts.open(spec, create=True).result().write(data.T[..., None]).result()
    return str(path)


WRITERS: dict[str, Any] = {
    "hdf5": lambda path, data: write_hdf5(path.with_suffix(".h5"), data, resolution=SIZE),
    "mrc": lambda path, data: write_mrc(path.with_suffix(".mrc"), data),
    "n5": lambda path, data: write_n5(path, data, resolution=list(reversed(SIZE)), units=["nm"] * 3),
    "precomputed": write_precomputed,
}


def check(url: str, data: NDArray[Any], **options: Any) -> None:
    """Voxels in parts and at once, in this process and as another one opens them, and the voxel size."""
    volume = open_volume(url, **options)
    spec = volume.spec
    assert (spec.shape, spec.dtype) == (data.shape, data.dtype.name)
    assert spec.voxel_size == pytest.approx(SIZE)
    assert json.loads(json.dumps(spec.identity)) == spec.identity
    for other in (volume, pickle.loads(pickle.dumps(volume)), open_volume(volume.url, **volume.options)):
        assert other.spec == spec
        for box in (INNER, Box.of(data.shape), Box((5, 9, 13), (6, 10, 14))):
            found = other.read(box)
            np.testing.assert_array_equal(found, data[box.slices()])
            assert found.dtype == data.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRITERS)
def test_volumes_of_other_programs_are_read(tmp_path: Path, name: str, dtype: str) -> None:
    if (name, dtype) == ("mrc", "uint8"):
        pytest.skip("mrcfile has no unsigned bytes")
    data = greys(dtype=dtype)
    check(WRITERS[name](tmp_path / "v", data), data)


@pytest.mark.parametrize("name", WRITERS)
def test_voxel_size_is_overridden_by_the_flag(tmp_path: Path, name: str) -> None:
    url = WRITERS[name](tmp_path / "v", greys())
    assert open_volume(url, voxel_size=(5, 5, 5)).spec.voxel_size == (5, 5, 5)


@pytest.mark.parametrize("name", WRITERS)
def test_threads_read_one_volume_at_once(tmp_path: Path, name: str) -> None:
    data = greys((12, 20, 20))
    volume = open_volume(WRITERS[name](tmp_path / "v", data))
    boxes = [Box((z, y, 0), (z + 3, y + 5, 20)) for z in range(0, 12, 3) for y in range(0, 20, 5)] * 3
    start = threading.Barrier(4)

    def read(part: int) -> list[bool]:
        start.wait()
        return [np.array_equal(volume.read(box), data[box.slices()]) for box in boxes[part::4]]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(equal) for equal in pool.map(read, range(4)))


@pytest.mark.parametrize("name", ["hdf5", "mrc", "n5"])
def test_a_missing_voxel_size_shows_the_flag(tmp_path: Path, name: str) -> None:
    data, path = greys(dtype="int16"), tmp_path / "v.x"
    writers: dict[str, Any] = {
        "hdf5": write_hdf5,
        "n5": write_n5,
        "mrc": lambda path, data: write_mrc(path, data, None),
    }
    url = writers[name](path, data)
    with pytest.raises(InputError, match="give --voxel-size Z,Y,X in nanometres"):
        open_volume(url)
    check(url, data, voxel_size=SIZE)


@pytest.mark.parametrize("name", ["hdf5", "mrc"])
def test_formats_of_one_resolution_have_no_levels(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="has no level 1"):
        open_volume(WRITERS[name](tmp_path / "v", greys()), level=1)


# HDF5


@pytest.mark.parametrize(
    "attributes",
    [{"resolution": SIZE}, {"element_size_um": [s / 1000 for s in SIZE]}, {"voxel_size": np.array(SIZE, "f4")}],
)
def test_voxel_size_of_hdf5_attributes(tmp_path: Path, attributes: dict[str, Any]) -> None:
    check(write_hdf5(tmp_path / "v.h5", greys(), **attributes), greys())


def test_origin_of_a_cremi_file(tmp_path: Path) -> None:
    url = write_hdf5(tmp_path / "v.h5", greys(), resolution=SIZE, offset=(400.0, 80, 4))
    assert open_volume(url).spec.origin == (400, 80, 4)


def test_the_only_volume_of_an_hdf5_file_needs_no_path(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "v.h5", greys(), resolution=SIZE)
    with h5py.File(tmp_path / "v.h5", "a") as file:
        file["table"] = np.zeros(9)
    check(str(tmp_path / "v.h5"), greys())
    with h5py.File(tmp_path / "v.h5", "a") as file:
        file["labels"] = greys()
    with pytest.raises(InputError, match=r"holds /labels, /volumes/raw; give one as v\.h5:/path"):
        open_volume(tmp_path / "v.h5")


def test_axes_of_hdf5_that_are_no_z_y_x(tmp_path: Path) -> None:
    check(write_hdf5(tmp_path / "a.h5", greys()[None, ..., None], resolution=SIZE), greys())
    two = np.stack([greys(), greys(seed=1)])
    url = write_hdf5(tmp_path / "b.h5", two, resolution=SIZE)
    check(url, two[1], channel=1)
    with pytest.raises(InputError, match="choose one with --channel"):
        open_volume(url)


def test_hdf5_mistakes_are_named(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "v.h5", greys(), resolution=SIZE)
    with h5py.File(tmp_path / "v.h5", "a") as file:
        file["flat"] = np.zeros((3, 3))
        file["text"] = "words"
        file["loop"] = h5py.SoftLink("/loop")
        file["away"] = h5py.ExternalLink("/etc/passwd", "/")
        file["alias"] = h5py.SoftLink("/volumes/raw")
        file.create_dataset("outside", SHAPE, "u1", external=[(str(tmp_path / "raw"), 0, 840)])
        layout = h5py.VirtualLayout(SHAPE, "u1")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", SHAPE)
        file.create_virtual_dataset("virtual", layout)
    for name, expected in {
        "missing": "has no /missing; it holds",
        "volumes": "is no array of numbers",
        "text": "is no array of numbers",
        "flat": "has shape (3, 3), expected z, y, x",
        "loop": "leads to itself",
        "away": "leads to another file, /etc/passwd",
        "outside": "lies in other files",
        "virtual": "lies in other files",
    }.items():
        with pytest.raises(InputError) as error:
            open_volume(f"{tmp_path}/v.h5:/{name}", voxel_size=SIZE)
        assert expected in str(error.value), name
    check(f"{tmp_path}/v.h5:/alias", greys())


def test_without_h5py_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = write_hdf5(tmp_path / "v.h5", greys())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"pip install 'emdiffuse_vol\[formats\]'"):
        open_volume(url)


def test_a_real_hdf5_file(data: Path) -> None:
    volume = open_volume(data / "gala_fib_hdf5/train-image.h5", voxel_size=(8, 8, 8))
    assert (volume.spec.shape, volume.spec.dtype) == ((50, 100, 200), "uint8")
    with h5py.File(data / "gala_fib_hdf5/train-image.h5") as file:
        np.testing.assert_array_equal(volume.read(Box((3, 20, 30), (9, 60, 170))), file["stack"][3:9, 20:60, 30:170])


# MRC


def test_signed_and_unsigned_bytes_of_mrc(tmp_path: Path) -> None:
    signed = np.arange(-100, -100 + 6 * 5 * 4, dtype=np.int64).reshape(6, 5, 4).astype(np.int8)
    url = write_mrc(tmp_path / "v.mrc", signed)
    volume = open_volume(url)
    assert volume.spec.dtype == "int16"
    np.testing.assert_array_equal(volume.read(Box.of((6, 5, 4))), signed.astype(np.int16))
    content = bytearray((tmp_path / "v.mrc").read_bytes())
    content[152:160] = (1146047817).to_bytes(4, "little") + (0).to_bytes(4, "little")
    (tmp_path / "v.mrc").write_bytes(content)
    volume = open_volume(url)
    assert volume.spec.dtype == "uint8"
    np.testing.assert_array_equal(volume.read(Box.of((6, 5, 4))), signed.view(np.uint8))


def test_big_endian_mrc_with_an_extended_header_and_other_axes(tmp_path: Path) -> None:
    data = greys(dtype="int16")
    with mrcfile.new(tmp_path / "v.mrc") as file:
        file.set_data(np.ascontiguousarray(data.transpose(1, 0, 2)).astype(">i2"))  # sections are y
        file.header.mapc, file.header.mapr, file.header.maps = 1, 3, 2
        file.header.mx, file.header.my, file.header.mz = 14, 10, 6
        file.header.cella = (14 * 40, 10 * 80, 6 * 400)
        file.set_extended_header(np.zeros(100, "V1"))
    assert (tmp_path / "v.mrc").read_bytes()[212] == 0x11
    check(str(tmp_path / "v.mrc"), data)


# N5


@pytest.mark.parametrize(
    "attributes",
    [
        {"pixelResolution": {"dimensions": [0.004, 0.008, 0.04], "unit": "um"}},
        {"pixelResolution": [4, 8, 40]},
        {"resolution": [4, 8, 40]},
        {"transform": {"axes": ["z", "y", "x"], "scale": [40, 8, 4], "translate": [0, 0, 0], "units": ["nm"] * 3}},
    ],
)
def test_voxel_size_of_n5_attributes(tmp_path: Path, attributes: dict[str, Any]) -> None:
    check(write_n5(tmp_path / "v.n5", greys(), **attributes), greys())


def test_levels_of_an_n5_group(tmp_path: Path) -> None:
    root = tmp_path / "v.n5/raw"
    write_n5(root / "s0", greys())
    write_n5(root / "s1", greys()[::2, ::2, ::2], downsamplingFactors=[2, 2, 2])
    (root / "attributes.json").write_text(json.dumps({"pixelResolution": {"dimensions": [4, 8, 40], "unit": "nm"}}))
    check(str(root), greys())
    coarse = open_volume(root, level=1)
    assert coarse.spec.voxel_size == (80, 16, 8)
    np.testing.assert_array_equal(coarse.read(Box.of((3, 5, 7))), greys()[::2, ::2, ::2])
    with pytest.raises(InputError, match="without level 2, s2"):
        open_volume(root, level=2)


# Precomputed


def test_a_jpeg_precomputed_volume_is_near_its_greys(tmp_path: Path) -> None:
    z, y, x = np.meshgrid(*map(np.arange, (8, 16, 16)), indexing="ij")
    data = (100 + 2 * z + 3 * y + x).astype(np.uint8)
    volume = open_volume(write_precomputed(tmp_path / "v", data, "jpeg", chunk_size=[8, 8, 8]))
    assert np.abs(volume.read(Box.of(data.shape)).astype(int) - data).max() <= 12


def test_offset_and_scales_of_precomputed(tmp_path: Path) -> None:
    write_precomputed(tmp_path / "v", greys(), voxel_offset=[5, 6, 7])
    coarse = greys()[::2, ::2, ::2]
    write_precomputed(tmp_path / "v", coarse, resolution=[8, 16, 80])
    check(f"precomputed://{tmp_path}/v", greys())
    assert open_volume(tmp_path / "v").spec.origin == (7 * 40, 6 * 8, 5 * 4)
    volume = open_volume(tmp_path / "v", level=1)
    assert volume.spec.voxel_size == (80, 16, 8)
    np.testing.assert_array_equal(volume.read(Box.of((3, 5, 7))), coarse)
    with pytest.raises(InputError, match="levels 0 to 1, found level 2"):
        open_volume(tmp_path / "v", level=2)


@pytest.mark.parametrize(("name", "chunk"), [("n5", "1/0/1"), ("precomputed", "4-8_0-4_4-6")])
def test_a_damaged_chunk_is_named(tmp_path: Path, name: str, chunk: str) -> None:
    url = WRITERS[name](tmp_path / "v", greys())
    file = next(f for f in (tmp_path / "v").rglob("*") if str(f).endswith(chunk) and f.is_file())
    file.write_bytes(file.read_bytes()[:9])
    with pytest.raises(InputError, match=f"chunk {chunk} of v.* is damaged: .*; copy it again"):
        open_volume(url).read(Box.of(SHAPE))
    assert open_volume(url).read(Box.of((4, 4, 4))).shape == (4, 4, 4)


# Specs of tensorstore


def test_a_spec_is_opened_as_text_and_from_a_file(tmp_path: Path) -> None:
    write_precomputed(tmp_path / "v", greys())
    spec = json.dumps({"driver": "neuroglancer_precomputed", "kvstore": kvstore(tmp_path / "v")})
    (tmp_path / "v.json").write_text(spec)
    check(f"tensorstore:{spec}", greys())
    check(str(tmp_path / "v.json"), greys())


def test_a_spec_with_labels_and_a_transform(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "v.zarr", data=greys((14, 2, 6, 10)), chunks=(4, 1, 4, 4))
    labels = {"labels": ["x", "c", "z", "y"], "inclusive_min": [0] * 4, "exclusive_max": [14, 2, 6, 10]}
    transform = {"input_" + k: v for k, v in labels.items()}
    spec = {"driver": "zarr3", "kvstore": kvstore(tmp_path / "v.zarr"), "transform": transform}
    expected = greys((14, 2, 6, 10))[:, 1].transpose(1, 2, 0)
    check(f"tensorstore:{json.dumps(spec)}", np.ascontiguousarray(expected), voxel_size=SIZE, channel=1)


def test_a_spec_neither_creates_nor_deletes(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "v.zarr", data=greys(), chunks=(4, 4, 4))
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": kvstore(tmp_path / "v.zarr"), "create": True}
    check(f"tensorstore:{json.dumps(spec | {'delete_existing': True})}", greys(), voxel_size=SIZE)
    spec |= {"kvstore": kvstore(tmp_path / "new.zarr"), "metadata": {"shape": [3, 3, 3], "data_type": "uint8"}}
    with pytest.raises(InputError, match="cannot be opened"):
        open_volume(f"tensorstore:{json.dumps(spec)}", voxel_size=SIZE)
    assert not (tmp_path / "new.zarr").exists()


def test_metadata_nested_without_end_are_refused(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "v.zarr", data=greys(), chunks=(4, 4, 4))
    (tmp_path / "v.zarr/zarr.json").write_text("[" * 100_000 + "]" * 100_000)
    for path in (f"{tmp_path}/v.zarr/", f"{tmp_path}/v.zarr"):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        for nested in (spec, {"driver": "cast", "base": spec, "dtype": "uint8"}):
            with pytest.raises(InputError, match="nested too deeply"):
                open_volume(f"tensorstore:{json.dumps(nested)}", voxel_size=SIZE)
    with pytest.raises(InputError, match="is not JSON"):
        open_volume(tmp_path / "v.zarr", voxel_size=SIZE)


# Over the network


@pytest.mark.parametrize("name", ["n5", "precomputed"])
def test_folders_are_read_over_http(tmp_path: Path, name: str) -> None:
    data = greys()
    WRITERS[name](tmp_path / "v", data)
    with serving(tmp_path) as address:
        check(f"{address}/v", data)
        check(f"{name}://{address}/v", data)
        with pytest.raises(InputError, match="is not a Zarr, N5 or precomputed"):
            open_volume(f"{address}/elsewhere")


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, Any]]:
    with local_s3() as found:
        yield found


@pytest.mark.parametrize("name", ["n5", "precomputed", "zarr"])
def test_buckets_are_read(tmp_path: Path, bucket: tuple[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the address of an object, by s3://, and by a spec that names the server, as private ones need it."""
    address, put = bucket
    data, folder = greys(), tmp_path / f"{name}-volume"
    write_chunked(name, folder, data)
    put(folder)
    check(f"{address}/volumes/{folder.name}", data, voxel_size=SIZE)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("HOME", str(tmp_path))  # no credentials: those of public buckets are not looked for
    for variable in AWS_CREDENTIALS:
        monkeypatch.delenv(variable, raising=False)
    check(f"s3://volumes/{folder.name}", data, voxel_size=SIZE)
    store = {"driver": "s3", "bucket": "volumes", "path": f"{folder.name}/", "endpoint": address}
    store |= {"aws_region": "us-east-1", "aws_credentials": {"type": "anonymous"}}
    spec: dict[str, Any] = {"driver": DRIVERS[name], "kvstore": store}
    if name == "n5":
        spec["transform"] = {"input_labels": ["x", "y", "z"]}
    check(f"tensorstore:{json.dumps(spec)}", data, voxel_size=SIZE)
    for elsewhere in (f"{address}/volumes/elsewhere", "s3://volumes/elsewhere"):
        with pytest.raises(InputError, match="is not a Zarr, N5 or precomputed"):
            open_volume(elsewhere, voxel_size=SIZE)


DRIVERS = {"n5": "n5", "precomputed": "neuroglancer_precomputed", "zarr": "zarr3"}


def write_chunked(name: str, folder: Path, data: NDArray[Any]) -> None:
    if name == "zarr":
        zarr.create_array(folder, data=data, chunks=(4, 4, 4))
    else:
        WRITERS[name](folder, data)


def test_buckets_of_google_are_read(tmp_path: Path) -> None:
    """In a process of its own: tensorstore looks once where Google is."""
    for name in DRIVERS:
        write_chunked(name, tmp_path / "volumes" / name, greys())
    code = (
        "import sys, numpy as np; from test_formats import *\n"
        "for name in DRIVERS: check(f'gs://volumes/{name}', greys(), voxel_size=SIZE)\n"
        "with pytest.raises(InputError, match='is not a Zarr'): open_volume('gs://volumes/elsewhere')"
    )
    with serving(tmp_path, Objects) as address:
        google = {"TENSORSTORE_GCS_HTTP_URL": address, "NO_GCE_CHECK": "true", "HOME": str(tmp_path)}
        path = {"PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run([sys.executable, "-c", code], env=os.environ | google | path, check=True)


# TIFF


@pytest.mark.parametrize(
    ("dress", "options"),
    [
        ("BigTIFF", {"bigtiff": True}),
        ("tiled", {"tile": (16, 16), "compression": "zlib", "predictor": True}),
        ("OME", {"ome": True, "metadata": {"axes": "ZYX"}}),
        ("ImageJ", {"imagej": True, "metadata": {"axes": "ZYX"}}),
        ("plain pages", {"metadata": None}),
        ("big-endian", {"byteorder": ">"}),
        ("LZW", {"compression": "lzw"}),
        ("PackBits", {"compression": "packbits"}),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_dresses_of_tiff(tmp_path: Path, dress: str, options: dict[str, Any], dtype: str) -> None:
    if (dress, dtype) in (("ImageJ", "int16"), ("PackBits", "float32")) or (dress == "tiled" and dtype == "float32"):
        pytest.skip("does not exist")
    data = greys((5, 40, 37), dtype)
    tifffile.imwrite(tmp_path / "v.tif", data, photometric="minisblack", **options)
    volume = open_volume(tmp_path / "v.tif", voxel_size=SIZE)
    for box in (Box.of(data.shape), Box((1, 3, 2), (4, 18, 37))):
        np.testing.assert_array_equal(volume.read(box), data[box.slices()])


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ({"imagej": True}, "ZCYX"),
        ({"imagej": True, "truncate": True}, "ZCYX"),
        ({"ome": True}, "ZCYX"),
        ({"ome": True}, "CZYX"),
    ],
)
def test_a_channel_of_a_tiff(tmp_path: Path, kind: dict[str, Any], axes: str) -> None:
    data = greys((4, 2, 9, 11) if axes == "ZCYX" else (2, 4, 9, 11))
    tifffile.imwrite(tmp_path / "v.tif", data, photometric="minisblack", metadata={"axes": axes}, **kind)
    for channel in (0, 1):
        volume = open_volume(tmp_path / "v.tif", voxel_size=SIZE, channel=channel)
        expected = data.take(channel, axis=axes.index("C"))
        np.testing.assert_array_equal(volume.read(Box.of((4, 9, 11))), expected)
        again = open_volume(volume.url, **volume.options)
        np.testing.assert_array_equal(again.read(Box.of((4, 9, 11))), expected)
    for wrong in (None, 2):
        with pytest.raises(InputError, match="has 2 channels, expected z, y, x; choose one with --channel"):
            open_volume(tmp_path / "v.tif", voxel_size=SIZE, channel=wrong)


def test_files_that_ome_xml_names_are_not_opened(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    tifffile.imwrite(tmp_path / "secret.ome.tif", greys((2, 9, 11)), metadata={"axes": "ZYX"})
    tifffile.imwrite(inner / "v.ome.tif", greys((2, 9, 11), seed=1), metadata={"axes": "ZYX"})
    xml = tifffile.tiffcomment(inner / "v.ome.tif")
    start = xml.index("<TiffData")
    stop = xml.index("/>", start) + 2
    blocks = "".join(
        f'<TiffData IFD="{i}" FirstZ="{i}" PlaneCount="1">'
        f'<UUID FileName="../secret.ome.tif">urn:uuid:00000000-0000-0000-0000-00000000000{i}</UUID></TiffData>'
        for i in range(2)
    )
    tifffile.tiffcomment(inner / "v.ome.tif", (xml[:start] + blocks + xml[stop:]).encode())
    volume = open_volume(inner / "v.ome.tif", voxel_size=SIZE)
    np.testing.assert_array_equal(volume.read(Box.of((2, 9, 11))), greys((2, 9, 11), seed=1))


# Names that lead outside


def test_metadata_lead_nowhere_outside(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "inner/v.zarr", mode="w")
    zarr.create_array(tmp_path / "secret", data=greys(), chunks=(4, 4, 4))
    axes = [{"name": a, "type": "space"} for a in "zyx"]
    for path in ("../../secret", str(tmp_path / "secret"), "a/../../../secret", f"file://{tmp_path}/secret"):
        dataset = {"path": path, "coordinateTransformations": [{"type": "scale", "scale": list(SIZE)}]}
        group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [dataset]}]}
        with pytest.raises(InputError, match="expected a path below it"):
            open_volume(tmp_path / "inner/v.zarr")
    write_precomputed(tmp_path / "inner/p", greys())
    info = json.loads((tmp_path / "inner/p/info").read_text())
    info["scales"][0]["key"] = "../../secret"
    (tmp_path / "inner/p/info").write_text(json.dumps(info))
    with pytest.raises(InputError, match="expected a path below it"):
        open_volume(tmp_path / "inner/p")
    (tmp_path / "inner/n").mkdir()
    multiscales = [{"datasets": [{"path": "../../secret"}]}]
    (tmp_path / "inner/n/attributes.json").write_text(json.dumps({"multiscales": multiscales}))
    with pytest.raises(InputError, match="expected a path below it"):
        open_volume(tmp_path / "inner/n")


def test_the_tests_that_the_table_names_exist() -> None:
    here = Path(__file__).parent
    page = (here.parent / "docs/compatibility.md").read_text()
    there = "".join(file.read_text() for file in here.glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in there] == []
