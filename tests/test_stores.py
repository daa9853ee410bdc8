"""Volumes on disk: what other programs wrote is read right, what we write is valid, and mistakes are named."""

from __future__ import annotations

import json
import pickle
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import ome_zarr_models
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from emdiffuse_vol.errors import GeometryError, InputError, OutputError
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.stores.image import coarsen, create_image, finish, open_array, write_units
from emdiffuse_vol.stores.ome_zarr import compose
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.pyramid import downsample, pyramid_shapes
from emdiffuse_vol.stores.tiff import natural
from emdiffuse_vol.stores.volume import DTYPES

SHAPE: Triple = (6, 10, 14)
SIZE = (40.0, 8.0, 4.0)
INNER = Box((1, 2, 3), (5, 9, 14))


def greys(shape: tuple[int, ...] = SHAPE, dtype: str = "uint8", seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(1, 250, shape).astype(dtype)


def write_ome(
    path: Path,
    data: NDArray[Any],
    axes: str = "zyx",
    *,
    version: str = "0.5",
    scale: Any = None,
    translation: Any = None,
    unit: str | None = "nanometer",
    whole: list[dict[str, Any]] | None = None,
    shards: tuple[int, ...] | None = None,
    levels: int = 1,
) -> Path:
    """An OME-Zarr as zarr-python writes it. ``whole``: transformations of the multiscale."""
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    kinds = {"c": "channel", "t": "time"}
    described: list[dict[str, Any]] = [{"name": a, "type": kinds.get(a, "space")} for a in axes]
    for axis in described:
        if axis["type"] == "space" and unit is not None:
            axis["unit"] = unit
    datasets = []
    for level in range(levels):
        step: Any = (..., *(slice(None, None, 2**level if a in "zyx" else 1) for a in axes))
        part = data[step]
        chunks = tuple(min(4, n) for n in part.shape)
        array = group.create_array(f"s{level}", shape=part.shape, dtype=part.dtype, chunks=chunks, shards=shards)
        array[...] = part
        factors = [(f if scale is None else scale[i]) * (2**level) for i, f in enumerate([1.0] * len(axes))]
        steps: list[dict[str, Any]] = [{"type": "scale", "scale": factors}]
        if translation is not None:
            steps.append({"type": "translation", "translation": translation})
        datasets.append({"path": f"s{level}", "coordinateTransformations": steps})
    multiscale: dict[str, Any] = {"axes": described, "datasets": datasets, "name": "test"}
    if whole:
        multiscale["coordinateTransformations"] = whole
    if version == "0.4":
        group.attrs["multiscales"] = [multiscale | {"version": "0.4"}]
    else:
        group.attrs["ome"] = {"version": version, "multiscales": [multiscale]}
    return path


def message(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Reading OME-Zarr


@pytest.mark.parametrize(
    ("version", "shards", "dtype"),
    [
        *(("0.4", None, dtype) for dtype in (*DTYPES, ">u2")),
        *(("0.5", shards, dtype) for dtype in DTYPES for shards in (None, (8, 8, 8))),
    ],
)
def test_ome_zarr_of_another_library_is_read(tmp_path: Path, version: str, shards: Any, dtype: str) -> None:
    data = greys(dtype=dtype)
    volume = open_volume(write_ome(tmp_path / "v.zarr", data, version=version, shards=shards, scale=SIZE))
    assert volume.spec.shape == SHAPE
    assert volume.spec.voxel_size == SIZE
    assert volume.spec.chunk == (4, 4, 4)
    assert volume.spec.dtype == np.dtype(dtype).name
    np.testing.assert_array_equal(volume.read(INNER), data[INNER.slices()])
    assert volume.read(INNER).dtype == volume.spec.dtype


@pytest.mark.parametrize("axes", ["xyz", "yzx", "tczyx", "zcyx", "xyzct"])
def test_any_axis_order_is_read_as_zyx(tmp_path: Path, axes: str) -> None:
    sizes = dict(zip("zyx", SHAPE, strict=True))
    stored = greys(tuple(sizes.get(a, 1) for a in axes))
    scale = [dict(zip("zyx", SIZE, strict=True)).get(a, 1.0) for a in axes]
    volume = open_volume(write_ome(tmp_path / "v.zarr", stored, axes, scale=scale))
    spatial = [a for a in axes if a in "zyx"]
    expected = stored.squeeze().transpose([spatial.index(a) for a in "zyx"])
    assert (volume.spec.shape, volume.spec.voxel_size) == (SHAPE, SIZE)
    np.testing.assert_array_equal(volume.read(INNER), expected[INNER.slices()])


@pytest.mark.parametrize(
    ("unit", "nm"), [("nanometer", 1), ("angstrom", 0.1), ("micrometer", 1e3), ("millimeter", 1e6), (None, 1)]
)
def test_units_become_nanometres(tmp_path: Path, unit: str | None, nm: float) -> None:
    path = write_ome(tmp_path / "v.zarr", greys(), unit=unit, scale=(4, 2, 1), translation=(8, 0, 2))
    spec = open_volume(path).spec
    assert spec.voxel_size == pytest.approx((4 * nm, 2 * nm, nm))
    assert spec.origin == pytest.approx((8 * nm, 0, 2 * nm))


def test_transformations_of_dataset_and_multiscale_are_composed(tmp_path: Path) -> None:
    whole = [{"type": "scale", "scale": [10, 2, 2]}, {"type": "translation", "translation": [100, 0, 7]}]
    path = write_ome(tmp_path / "v.zarr", greys(), scale=(4, 2, 1), translation=(3, 5, 0), whole=whole)
    spec = open_volume(path).spec
    assert spec.voxel_size == (40, 4, 2)
    assert spec.origin == (130, 10, 7)


@given(st.lists(st.tuples(st.sampled_from(["scale", "translation"]), st.integers(1, 9)), max_size=6))
def test_composed_transformations_do_what_the_steps_do(steps: list[tuple[str, int]]) -> None:
    scale, translation = compose([{"type": kind, kind: [value]} for kind, value in steps], 1)
    for index in (0.0, 3.0):
        position = index
        for kind, value in steps:
            position = position * value if kind == "scale" else position + value
        assert (scale or [1.0])[0] * index + translation[0] == position


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_level_is_opened_with_its_own_size(tmp_path: Path, version: str) -> None:
    data = greys()
    path = write_ome(tmp_path / "v.zarr", data, version=version, scale=SIZE, levels=2)
    volume = open_volume(path, level=1)
    assert volume.spec.shape == (3, 5, 7)
    assert volume.spec.voxel_size == tuple(2 * s for s in SIZE)
    np.testing.assert_array_equal(volume.read(Box.of((3, 5, 7))), data[::2, ::2, ::2])
    with pytest.raises(InputError, match="levels 0 to 1, found level 2"):
        open_volume(path, level=2)


def test_a_channel_is_chosen_by_its_index(tmp_path: Path) -> None:
    data = greys((2, *SHAPE))
    omero = {"channels": [channel("mean"), channel("uncertainty")]}
    create(tmp_path / "v.zarr", data.shape, axes="czyx", omero=omero)
    fill(tmp_path / "v.zarr", data)
    for index in (0, 1):
        np.testing.assert_array_equal(
            open_volume(tmp_path / "v.zarr", channel=index).read(INNER), data[index, 1:5, 2:9, 3:]
        )
    with pytest.raises(InputError) as error:
        open_volume(tmp_path / "v.zarr")
    assert "2 channels (mean, uncertainty), expected 1; choose one with --channel" in message(error)
    with pytest.raises(InputError, match="channels 0 to 1, found channel 2"):
        open_volume(tmp_path / "v.zarr", channel=2)


def test_a_plain_array_opens_with_a_voxel_size(tmp_path: Path) -> None:
    data = greys()
    zarr.create_array(tmp_path / "plain.zarr", data=data, chunks=(4, 4, 4))
    with pytest.raises(InputError, match="give --voxel-size Z,Y,X in nanometres"):
        open_volume(tmp_path / "plain.zarr")
    volume = open_volume(tmp_path / "plain.zarr", voxel_size=SIZE)
    assert volume.spec.voxel_size == SIZE
    np.testing.assert_array_equal(volume.read(INNER), data[INNER.slices()])


def test_given_voxel_size_overrides_the_stored_one(tmp_path: Path) -> None:
    assert open_volume(write_ome(tmp_path / "v.zarr", greys()), voxel_size=SIZE).spec.voxel_size == SIZE


def test_volumes_travel_between_processes(tmp_path: Path) -> None:
    data = greys((1, *SHAPE))
    path = write_ome(tmp_path / "v.zarr", data, "czyx", scale=(1, *SIZE))
    volume = open_volume(path, voxel_size=(5, 5, 5), channel=0)
    for other in (pickle.loads(pickle.dumps(volume)), open_volume(volume.url, **volume.options)):
        assert other.spec == volume.spec
        np.testing.assert_array_equal(other.read(INNER), volume.read(INNER))


def test_identity_knows_other_data_but_not_the_place(tmp_path: Path) -> None:
    def identity(name: str, source: str) -> dict[str, Any]:
        create(tmp_path / name, SHAPE, attributes={"emdvol": {"source": source}})
        return open_volume(tmp_path / name).spec.identity

    first = identity("a.zarr", "one")
    assert json.loads(json.dumps(first)) == first
    assert identity("b.zarr", "two") != first
    (tmp_path / "a.zarr").rename(tmp_path / "moved.zarr")
    assert open_volume(tmp_path / "moved.zarr").spec.identity == first


def test_a_volume_is_read_over_http(tmp_path: Path) -> None:
    data = greys()
    write_ome(tmp_path / "v.zarr", data, scale=SIZE)
    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        np.testing.assert_array_equal(open_volume(f"{url}/v.zarr").read(INNER), data[INNER.slices()])
        with pytest.raises(InputError, match="is not a Zarr"):
            open_volume(f"{url}/other.zarr")
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


# Damage


@pytest.mark.parametrize(
    ("version", "shards", "key"), [("0.4", None, "1.0.2"), ("0.5", None, "c/1/0/2"), ("0.5", (4, 4, 8), "c/1/0/1")]
)
@pytest.mark.parametrize("kind", ["truncated", "scribbled"])
def test_a_damaged_chunk_is_named(tmp_path: Path, version: str, shards: Any, key: str, kind: str) -> None:
    path = write_ome(tmp_path / "v.zarr", greys(), version=version, shards=shards)
    file = path / "s0" / key
    content = bytearray(file.read_bytes())
    if kind == "truncated":
        del content[len(content) // 2 :]
    else:
        content[:8] = b"scribble"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        open_volume(path).read(Box.of(SHAPE))
    assert message(error).startswith(f"chunk {key} of v.zarr/s0 is damaged: ")
    assert message(error).endswith("copy it again from its source")
    intact = Box.of((4, 10, 8))
    assert open_volume(path).read(intact).shape == intact.shape


@given(st.integers(0, 200), st.integers(0, 7))
@settings(max_examples=15, deadline=None)
def test_no_flipped_bit_of_ours_is_read_as_grey(tmp_path_factory: pytest.TempPathFactory, byte: int, bit: int) -> None:
    path = tmp_path_factory.mktemp("flip") / "v.zarr"
    data = greys((8, 8, 8))
    create(path, data.shape)
    fill(path, data)
    file = path / "0/c/0/0/0"
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"chunk c/0/0/0 of v.zarr/0 is damaged"):
        open_volume(path).read(Box.of((8, 8, 8)))


# Mistakes


def test_what_is_not_a_volume_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tif").write_text("no TIFF")
    (tmp_path / "broken.tif").write_bytes(b"II*\0broken")
    zarr.open_group(tmp_path / "group.zarr", mode="w")
    (tmp_path / "json.zarr").mkdir()
    (tmp_path / "json.zarr/zarr.json").write_text("{ no")
    for name, expected in {
        "missing": "does not exist; check the path",
        "empty": "neither Zarr metadata nor TIFF files, expected OME-Zarr, a TIFF file or a folder",
        "text.tif": "is not a TIFF file, expected OME-Zarr",
        "broken.tif": "cannot be read as TIFF",
        "group.zarr": "is a Zarr group without OME metadata",
        "json.zarr": "is not JSON",
    }.items():
        with pytest.raises(InputError) as error:
            open_volume(tmp_path / name, voxel_size=SIZE)
        assert expected in message(error), name


def test_wrong_axes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected z, y and x once each, found no single z"):
        open_volume(write_ome(tmp_path / "flat.zarr", greys((10, 14)), "yx"))
    with pytest.raises(InputError, match="3 positions along t, expected 1"):
        open_volume(write_ome(tmp_path / "time.zarr", greys((3, *SHAPE)), "tzyx"))
    with pytest.raises(InputError, match="4 axes, expected 3"):
        open_volume(write_ome(tmp_path / "four.zarr", greys((3, *SHAPE)), "czyx") / "s0", voxel_size=SIZE)


def test_wrong_metadata_are_named(tmp_path: Path) -> None:
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "unit": ({"unit": "furlong"}, "measures z in furlong"),
        "scale": ({"scale": (0, 1, 1)}, "expected positive numbers"),
        "short": ({"scale": (1.0, 1.0, 1.0), "translation": (1, 2)}, "make no sense"),
    }
    for name, (given_metadata, expected) in cases.items():
        with pytest.raises(InputError) as error:
            open_volume(write_ome(tmp_path / name, greys(), **given_metadata))
        assert expected in message(error)


def test_unsupported_dtypes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds float64, expected one of uint8, uint16, int16, float32"):
        open_volume(write_ome(tmp_path / "v.zarr", greys(dtype="float64")))
    tifffile.imwrite(tmp_path / "v.tif", greys(dtype="uint32"))
    with pytest.raises(InputError, match="holds uint32"):
        open_volume(tmp_path / "v.tif", voxel_size=SIZE)


# TIFF


def test_names_are_sorted_with_numbers_as_numbers() -> None:
    names = ["section_10.tif", "section_2.tif", "Section_1.tif", "2_b10", "2_b9", "10", "9"]
    assert sorted(names, key=natural) == [
        "2_b9",
        "2_b10",
        "9",
        "10",
        "Section_1.tif",
        "section_2.tif",
        "section_10.tif",
    ]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", ">u2"])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "zlib"}, {"compression": "zlib", "tile": (16, 16)}, {"rowsperstrip": 3}]
)
def test_a_tiff_stack_is_read(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    data = greys((5, 40, 37), dtype)
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, data, photometric="minisblack", **options)
    volume = open_volume(path, voxel_size=SIZE)
    assert (volume.spec.shape, volume.spec.dtype) == ((5, 40, 37), np.dtype(dtype).name)
    for box in (Box.of((5, 40, 37)), Box((1, 3, 2), (4, 18, 37)), Box((4, 17, 16), (5, 18, 17))):
        np.testing.assert_array_equal(volume.read(box), data[box.slices()])


def test_a_folder_of_sections_is_read_in_natural_order(tmp_path: Path) -> None:
    data = greys((12, 9, 11), "uint16")
    for z, section in enumerate(data):
        compression = "zlib" if z % 2 else None
        tifffile.imwrite(tmp_path / f"section_{z}.tif", section, compression=compression)
    (tmp_path / "._section_0.tif").write_bytes(b"left by another system")
    (tmp_path / "notes.txt").write_text("not a section")
    volume = open_volume(tmp_path, voxel_size=SIZE)
    np.testing.assert_array_equal(volume.read(Box.of((12, 9, 11))), data)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(volume)).read(Box.of((12, 9, 11))), data)


def test_voxel_size_of_imagej_and_ome_tiff(tmp_path: Path) -> None:
    data = greys()
    imagej, ome = tmp_path / "ij.tif", tmp_path / "ome.ome.tif"
    tifffile.imwrite(
        imagej,
        data,
        imagej=True,
        resolution=(1 / 0.004, 1 / 0.008),
        metadata={"spacing": 0.04, "unit": "um", "axes": "ZYX"},
    )
    sizes = {"PhysicalSizeZ": 40, "PhysicalSizeY": 8, "PhysicalSizeX": 4}
    units = {f"{key}Unit": "nm" for key in sizes}
    tifffile.imwrite(ome, data, metadata={"axes": "ZYX", **sizes, **units})
    for path in (imagej, ome):
        assert open_volume(path).spec.voxel_size == pytest.approx(SIZE, rel=1e-5)
        np.testing.assert_array_equal(open_volume(path).read(INNER), data[INNER.slices()])


def test_an_imagej_stack_described_by_one_page_is_read(tmp_path: Path) -> None:
    data = greys(dtype="uint16")
    tifffile.imwrite(tmp_path / "big.tif", data, imagej=True, metadata={"axes": "ZYX"}, truncate=True)
    with tifffile.TiffFile(tmp_path / "big.tif") as tif:
        assert len(tif.pages) == 1
    volume = open_volume(tmp_path / "big.tif", voxel_size=SIZE)
    np.testing.assert_array_equal(volume.read(Box.of(SHAPE)), data)


def test_resolution_without_spacing_is_no_voxel_size(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "v.tif", greys(), photometric="minisblack", resolution=(100, 100), resolutionunit=3)
    with pytest.raises(InputError, match="give --voxel-size"):
        open_volume(tmp_path / "v.tif")


def test_wrong_sections_are_named(tmp_path: Path) -> None:
    cases: dict[str, tuple[NDArray[Any], str]] = {
        "shape": (greys((9, 12)), "s_2.tif is uint8 (9, 12), expected uint8 (9, 11)"),
        "dtype": (greys((9, 11), "uint16"), "s_2.tif is uint16 (9, 11), expected uint8 (9, 11)"),
        "stack": (greys((2, 9, 11)), "s_2.tif holds 2 sections, expected one per file"),
        "colour": (greys((9, 11, 3)), "s_2.tif holds colours"),
    }
    for name, (section, expected) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        for z in (1, 10):
            tifffile.imwrite(folder / f"s_{z}.tif", greys((9, 11)))
        tifffile.imwrite(folder / "s_2.tif", section, photometric="rgb" if name == "colour" else "minisblack")
        with pytest.raises(InputError) as error:
            open_volume(folder, voxel_size=SIZE)
        assert expected in message(error)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_damaged_section_is_named(tmp_path: Path, compression: str | None) -> None:
    for z in range(3):
        tifffile.imwrite(tmp_path / f"s_{z}.tif", greys((64, 64)), compression=compression)
    volume = open_volume(tmp_path, voxel_size=SIZE)
    file = tmp_path / "s_1.tif"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"s_1\.tif is damaged: .*copy it again"):
        volume.read(Box.of((3, 64, 64)))
    with pytest.raises(InputError, match=r"s_1\.tif"):
        open_volume(tmp_path, voxel_size=SIZE).read(Box.of((3, 64, 64)))
    assert volume.read(Box((2, 0, 0), (3, 64, 64))).shape == (1, 64, 64)


def test_two_channels_of_a_tiff_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "v.tif", greys((4, 2, 9, 11)), imagej=True, metadata={"axes": "ZCYX"})
    with pytest.raises(InputError, match="expected z, y, x"):
        open_volume(tmp_path / "v.tif", voxel_size=SIZE)


def test_a_real_tiff_series(data: Path) -> None:
    folder = data / "celegans_tiff_series"
    with pytest.raises(InputError, match="give --voxel-size"):
        open_volume(folder)
    volume = open_volume(folder, voxel_size=(50, 4, 4))
    assert (volume.spec.shape, volume.spec.dtype) == ((21, 256, 256), "uint8")
    expected = tifffile.imread(folder / "c_elegans_em_z0010.tif")
    np.testing.assert_array_equal(volume.read(Box((10, 0, 0), (11, 256, 256)))[0], expected)


# Writing


def channel(label: str) -> dict[str, Any]:
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    return {"label": label, "color": "FFFFFF", "window": window, "active": True}


def create(path: Path, shape: tuple[int, ...], **settings: Any) -> None:
    lead = (1,) * (len(shape) - 3) if len(shape) == 3 else (shape[0],)
    defaults: dict[str, Any] = {"dtype": "uint8", "chunk": (*lead, 4, 4, 4), "shard": (*lead, 8, 8, 8)}
    create_image(str(path), shape=shape, voxel_size=SIZE, **(defaults | settings))


def fill(path: Path, data: NDArray[Any], level: int = 0) -> None:
    array = open_array(str(path), level, "w")
    z, y, x = data.shape[-3:]
    finish(write_units(array, Box.of((z, y, x)), data))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("axes", ["zyx", "czyx"])
def test_what_we_write_is_valid_and_read_by_others(tmp_path: Path, dtype: str, axes: str) -> None:
    data = greys(SHAPE if axes == "zyx" else (2, *SHAPE), dtype)
    omero = None if axes == "zyx" else {"channels": [channel("mean"), channel("uncertainty")]}
    create(tmp_path / "v.zarr", data.shape, dtype=dtype, axes=axes, levels=3, omero=omero, name="v", origin=(9, 8, 7))
    fill(tmp_path / "v.zarr", data)
    found = ome_zarr_models.open_ome_zarr(str(tmp_path / "v.zarr"), version="0.5")
    assert type(found).__name__ == "Image"
    group: Any = zarr.open_group(tmp_path / "v.zarr", mode="r")
    np.testing.assert_array_equal(np.asarray(group["0"]), data)
    assert group["0"].metadata.dimension_names == tuple(axes)
    units = [axis.get("unit") for axis in group.attrs["ome"]["multiscales"][0]["axes"]]
    assert units[-3:] == ["nanometer"] * 3


def test_levels_say_where_their_voxel_centres_are(tmp_path: Path) -> None:
    create(tmp_path / "v.zarr", (20, 33, 17), levels=3, origin=(10.0, 20.0, 30.0))
    for level in range(3):
        spec = open_volume(tmp_path / "v.zarr", level=level).spec
        assert spec.voxel_size == tuple(s * 2**level for s in SIZE)
        # The first voxel of level k is the mean of full voxels 0 .. 2^k - 1: its centre is the mean of theirs.
        centres = [np.mean([o + i * s for i in range(2**level)]) for o, s in zip((10, 20, 30), SIZE, strict=True)]
        assert spec.origin == pytest.approx(centres)


def test_attributes_stand_beside_ome(tmp_path: Path) -> None:
    create(tmp_path / "v.zarr", SHAPE, attributes={"emdvol": {"made": "here"}})
    assert zarr.open_group(tmp_path / "v.zarr", mode="r").attrs["emdvol"] == {"made": "here"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shard": (6, 8, 8)}, "not a multiple of chunk"),
        ({"chunk": (4, 4)}, "expected 3 positive sizes"),
        ({"dtype": "float64"}, "expected one of uint8"),
        ({"levels": 0}, "expected 1 or more"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(GeometryError, match=expected):
        create(tmp_path / "v.zarr", SHAPE, **settings)
    assert not (tmp_path / "v.zarr").exists()


def test_nothing_is_created_over_a_zarr(tmp_path: Path) -> None:
    write_ome(tmp_path / "v.zarr", greys(), version="0.4")
    with pytest.raises(OutputError, match="is a Zarr already"):
        create(tmp_path / "v.zarr", SHAPE)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((OutputError, InputError), match=r"file/v\.zarr"):
        create(tmp_path / "file" / "v.zarr", SHAPE)


@pytest.mark.parametrize("start", [(0, 0, 0), (0, 8, 8)])
def test_a_torn_shard_is_replaced_even_at_the_border(tmp_path: Path, start: Triple) -> None:
    path, data = tmp_path / "v.zarr", greys()
    create(path, SHAPE)
    fill(path, data)
    file = path / "0/c" / "/".join(str(a // 8) for a in start)
    file.write_bytes(file.read_bytes()[:50])
    box = Box(start, (start[0] + 8, start[1] + 8, start[2] + 8)) & Box.of(SHAPE)
    finish(write_units(open_array(str(path), 0, "w"), box, data[box.slices()]))
    np.testing.assert_array_equal(open_volume(path).read(Box.of(SHAPE)), data)


def test_partial_shards_are_refused(tmp_path: Path) -> None:
    create(tmp_path / "v.zarr", (20, 10, 14))
    array = open_array(str(tmp_path / "v.zarr"), 0, "w")
    for box in (Box((4, 0, 0), (8, 10, 14)), Box((0, 0, 0), (12, 10, 14)), Box((0, 0, 0), (8, 10, 4))):
        with pytest.raises(GeometryError, match="cuts through stored units"):
            write_units(array, box, np.zeros(box.shape, np.uint8))
    for wrong in (np.zeros((8, 10, 13), np.uint8), np.zeros((8, 10, 14)), np.zeros((1, 8, 10, 14), np.uint8)):
        with pytest.raises(GeometryError, match=r"needs a block of uint8 \(8, 10, 14\)"):
            write_units(array, Box.of((8, 10, 14)), wrong)


# Pyramid


@given(st.tuples(*[st.integers(1, 3000)] * 3))
def test_pyramid_ends_at_the_first_small_level(shape: Triple) -> None:
    shapes = pyramid_shapes(shape, smallest=100)
    assert shapes[0] == shape
    assert max(shapes[-1]) <= 100
    for fine, coarse in pairwise(shapes):
        assert max(fine) > 100
        assert coarse == tuple(-(-n // 2) for n in fine)


def slow_downsample(block: NDArray[Any]) -> NDArray[Any]:
    """One cell at a time; numpy rounds half to even."""
    shape = tuple(-(-n // 2) for n in block.shape)
    out = np.empty(shape, block.dtype)
    for i, j, k in np.ndindex(shape):
        mean = block[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2].astype(np.float64).mean()
        out[i, j, k] = mean if block.dtype == np.float32 else np.rint(mean)
    return out


@given(
    st.tuples(*[st.integers(1, 5)] * 3), st.sampled_from(["uint8", "uint16", "int16", "float32"]), st.integers(0, 99)
)
@settings(deadline=None)
def test_downsample_is_the_mean_of_what_is_there(shape: Triple, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        block = rng.normal(size=shape).astype(dtype)
    else:
        info = np.iinfo(dtype)
        spread = rng.integers(info.min, info.max, shape, endpoint=True)
        block = np.where(rng.random(shape) < 0.5, spread, rng.integers(0, 3, shape)).astype(dtype)
    expected = slow_downsample(block)
    if dtype == "float32":
        np.testing.assert_allclose(downsample(block), expected, rtol=1e-6, atol=1e-7)
    else:
        np.testing.assert_array_equal(downsample(block), expected)
    two = np.stack([block, block[::-1]])
    np.testing.assert_array_equal(downsample(two)[0], downsample(block))


def test_a_level_made_in_pieces_equals_one_made_at_once(tmp_path: Path) -> None:
    data = greys((70, 9, 11))
    create(tmp_path / "v.zarr", data.shape, levels=2)
    fill(tmp_path / "v.zarr", data)
    fine = open_array(str(tmp_path / "v.zarr"), 0)
    whole = coarsen(fine, Box.of((35, 5, 6)))
    np.testing.assert_array_equal(whole, downsample(data))
    box = Box((32, 3, 0), (35, 5, 6))
    np.testing.assert_array_equal(coarsen(fine, box), whole[box.slices()])
