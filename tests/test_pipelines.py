"""The recipes for public volumes, on local copies of their layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from fanc import FANC
from microns import MICRONS
from public import PublicVolume, main
from servers import BUCKET, local_s3, serving
from volumes import read, smooth_volume, write_weights

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.opening import open_volume

OFFSET = (30, 200, 100)  # of the first voxel, x y z: published volumes do not begin at 0
SMALL = ["--executor", "local", "--workers", "1", "--shard", "64,64,64", "--tile", "32,32,64", "--members", "2"]


def publish(folder: Path, greys: np.ndarray, resolution: tuple[float, float, float]) -> Path:
    """A precomputed volume as the archives have it: jpeg, an offset, coarser scales whose z stays; x y z."""
    for level in range(2):
        part = greys[:, :: 2**level, :: 2**level]
        x, y, z = resolution
        offset = [OFFSET[0] >> level, OFFSET[1] >> level, OFFSET[2]]
        scale = {"size": part.shape[::-1], "resolution": [x * 2**level, y * 2**level, z], "encoding": "jpeg"}
        scale |= {"chunk_size": [32, 32, 4], "voxel_offset": offset}
        spec = {
            "driver": "neuroglancer_precomputed",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "multiscale_metadata": {"type": "image", "data_type": "uint8", "num_channels": 1},
            "scale_metadata": scale,
        }
        ts.open(spec, create=True).result()[ts.d[:].translate_to[0]].write(part.T[..., None]).result()
    return folder


@pytest.mark.parametrize(
    ("public", "resolution", "planes"), [(MICRONS, (8, 8, 40), 16), (FANC, (4.3, 4.3, 45), 32)], ids=["microns", "fanc"]
)
def test_a_region_of_a_public_volume_is_reconstructed(
    tmp_path: Path, public: PublicVolume, resolution: tuple[float, float, float], planes: int
) -> None:
    path = public.url.split("/", 3)[3]
    copy = publish(tmp_path / BUCKET / path, smooth_volume((9, 70, 90)), resolution)
    assert json.loads((copy / "info").read_text())["scales"][0]["key"] == "_".join(f"{r:g}" for r in resolution)
    sizes = resolution[::-1]
    centre = [(o + n) * s for o, n, s in zip(OFFSET[::-1], (3, 30, 50), sizes, strict=True)]
    write_weights(tmp_path / "w.safetensors")
    arguments = [str(tmp_path / "made"), "--centre", ",".join(map(str, centre)), "--size", "4,24,40"]
    arguments += [*SMALL, "--weights", str(tmp_path / "w.safetensors")]
    with local_s3() as (address, put), serving(tmp_path / BUCKET) as plain:
        if public is MICRONS:
            put(tmp_path / BUCKET / path.split("/", 1)[0])
            url = f"{address}/{BUCKET}/{path}"
        else:
            url = f"{plain}/{path}"
        main(public, [*arguments, "--url", url])
        published = open_volume(copy)
        with pytest.raises(SystemExit, match="another region"):
            main(public, [*arguments, "--url", url, "--size", "3,24,40"])
        with pytest.raises(SystemExit, match="is not inside the volume's shape"):
            main(public, [str(tmp_path / "far"), "--url", url, "--centre", "1,1,1"])
    assert not (tmp_path / "far").exists()
    made = read(tmp_path / "made/iso.zarr")
    assert made.shape == (2, planes, 24, 40)
    np.testing.assert_array_equal(made[0, 0], published.read(Box((1, 18, 30), (2, 42, 70)))[0])
    origin = [(o + n) * s for o, n, s in zip(OFFSET[::-1], (1, 18, 30), sizes, strict=True)]
    assert open_volume(tmp_path / "made/iso.zarr", channel=0).spec.origin == pytest.approx(origin)
    assert public.licence in (tmp_path / "made/SOURCE.txt").read_text()
    assert "<html" in (tmp_path / "made/report.html").read_text()
