"""Reading Zarr: OME-Zarr 0.4 (zarr v2) and 0.5 (zarr v3, sharded or not), and plain 3D arrays.

Convention: the metadata names the axes, in any order. Coordinates: a dataset's
``coordinateTransformations``, then those of the multiscale, each ``scale`` or ``translation``, in their order
(OME-NGFF 0.4 and 0.5, section "multiscales"). Units become nanometres; an axis without one is taken as nanometres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tensorstore as ts

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import AXES
from emdiffuse_vol.stores.chunked import (
    ChunkedVolume,
    ChunkName,
    check_array,
    chunked_volume,
    joined,
    open_chunked,
)
from emdiffuse_vol.stores.kvstore import absolute, inside, kvstore, read_json
from emdiffuse_vol.stores.units import nanometres
from emdiffuse_vol.stores.volume import Nanometres


@dataclass(frozen=True)
class Level:
    """What the group says about one array in it. axes: lower-case names in stored order; channels: names, if any;
    digested: JSON values that tell this image from another."""

    path: str
    axes: tuple[str, ...]
    voxel_size: Nanometres | None = None
    origin: Nanometres = (0.0, 0.0, 0.0)
    channels: tuple[str, ...] = ()
    format: str = "zarr"
    digested: Any = None


def open_zarr(
    url: str, *, voxel_size: Nanometres | None = None, level: int = 0, channel: int | str | None = None
) -> ChunkedVolume:
    """``voxel_size`` overrides the metadata. Raises InputError."""
    url = absolute(url)
    name = url.rsplit("/", 1)[-1]
    group = read_attributes(url)
    if group is None:
        raise InputError(f"{url} is not a Zarr: it has neither zarr.json nor .zgroup nor .zarray; check the path")
    node, attributes = group
    if node == "array":
        found = Level("", tuple(AXES))
    else:
        found = read_level(name, attributes, level)
        name = f"{name}/{found.path}"
    array, metadata = _open_level(url, found.path, name)
    if node == "array":
        found = _plain_level(name, array, metadata)
    return chunked_volume(
        url,
        {"voxel_size": voxel_size, "level": level, "channel": channel},
        name,
        array,
        found.axes,
        voxel_size=voxel_size or found.voxel_size,
        origin=found.origin,
        channels=found.channels,
        format=found.format,
        digested=[metadata, found.path, found.digested],
        chunk_name=_chunk_name(metadata),
    )


def read_attributes(url: str) -> tuple[str, dict[str, Any]] | None:
    """Kind of the node ("group" or "array") and its attributes; None where there is no Zarr."""
    if node := read_json(url, "zarr.json"):
        return str(node.get("node_type")), node.get("attributes") or {}
    if read_json(url, ".zarray"):
        return "array", {}
    attributes = read_json(url, ".zattrs")
    if attributes is None and read_json(url, ".zgroup") is None:
        return None
    return "group", attributes or {}


def read_level(name: str, attributes: dict[str, Any], level: int) -> Level:
    """The metadata of one level of an OME-Zarr group. Raises InputError."""
    ome = attributes.get("ome") or attributes
    if not isinstance(ome, dict):
        raise InputError(f"{name} has OME metadata that are no object; correct them")
    if "bioformats2raw.layout" in ome:
        raise InputError(f"{name} is a collection of images, expected one; give the path of one, such as {name}/0")
    if not ome.get("multiscales"):
        raise InputError(f"{name} is a Zarr group without OME metadata; give the path of the array inside it")
    try:
        found = _parse_level(name, ome, level)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{name} has OME-Zarr metadata that make no sense: {error!r}; correct them") from error
    made = attributes.get("emdvol")
    source = [made.get(key) for key in ("source", "fingerprint")] if isinstance(made, dict) else None
    return replace(found, digested=[ome, source])


def _parse_level(name: str, ome: dict[str, Any], level: int) -> Level:
    multiscale = ome["multiscales"][0]
    datasets = multiscale["datasets"]
    if not 0 <= level < len(datasets):
        raise InputError(f"{name} has levels 0 to {len(datasets) - 1}, found level {level}; give --level within them")
    described = [axis if isinstance(axis, dict) else {"name": axis} for axis in multiscale.get("axes", [])]
    axes = tuple("c" if axis.get("type") == "channel" else str(axis["name"]).lower() for axis in described)
    if missing := [a for a in AXES if axes.count(a) != 1]:
        raise InputError(
            f"{name} has axes ({', '.join(axes)}), expected z, y and x once each, found no single {missing[0]}; "
            "correct its metadata"
        )
    units = [_nanometres(name, a, axis.get("unit")) for a, axis in zip(axes, described, strict=True) if a in AXES]
    transformations = [
        *datasets[level].get("coordinateTransformations", []),
        *multiscale.get("coordinateTransformations", []),
    ]
    scale, translation = compose(transformations, len(axes))
    spatial = {a: i for i, a in enumerate(axes) if a in AXES}
    nm = dict(zip(spatial, units, strict=True))
    size = [scale[spatial[a]] * nm[a] for a in AXES] if scale else None
    z, y, x = (translation[spatial[a]] * nm[a] for a in AXES)
    channels = (c.get("label", "") for c in (ome.get("omero") or {}).get("channels", []))
    version = ome.get("version") or multiscale.get("version") or "without version"
    return Level(
        path=inside(name, datasets[level]["path"]),
        axes=axes,
        voxel_size=(size[0], size[1], size[2]) if size else None,
        origin=(z, y, x),
        channels=tuple(channels),
        format=f"OME-Zarr {version}",
    )


def compose(transformations: Sequence[dict[str, Any]], rank: int) -> tuple[list[float] | None, list[float]]:
    """One scale and one translation out of a sequence of them: position = scale * index + translation.

    The scale is None when no transformation has one.
    """
    scale, translation, scaled = [1.0] * rank, [0.0] * rank, False
    for step in transformations:
        if step["type"] == "scale":
            factors = [float(f) for f in step["scale"]]
            scale = [s * f for s, f in zip(scale, factors, strict=True)]
            translation = [t * f for t, f in zip(translation, factors, strict=True)]
            scaled = True
        elif step["type"] == "translation":
            translation = [t + float(d) for t, d in zip(translation, step["translation"], strict=True)]
        elif step["type"] != "identity":
            raise ValueError(f"coordinate transformation {step['type']}, expected scale or translation")
    return (scale if scaled else None), translation


def _nanometres(name: str, axis: str, unit: str | None) -> float:
    factor = nanometres(unit) if unit else 1.0
    if factor is None:
        raise InputError(f"{name} measures {axis} in {unit}, expected a unit of length such as nanometer; correct it")
    return factor


def _open_level(url: str, path: str, name: str) -> tuple[ts.TensorStore, dict[str, Any]]:
    where = f"{url}/{path}" if path else url
    metadata = read_json(where, "zarr.json")
    driver = "zarr3" if metadata else "zarr"
    metadata = metadata or read_json(where, ".zarray")
    if metadata is None:
        raise InputError(f"{name} is missing, though its metadata name it; copy it again from its source")
    array = open_chunked(name, {"driver": driver, "kvstore": kvstore(url, path)})
    check_array(name, array)
    return array, metadata


def _plain_level(name: str, array: ts.TensorStore, metadata: dict[str, Any]) -> Level:
    """An array without OME metadata: its dimension names if they are z, y, x, else that order."""
    names = tuple(str(n).lower() for n in metadata.get("dimension_names") or ())
    if array.rank != 3:
        raise InputError(
            f"{name} is a plain Zarr array with {array.rank} axes, expected 3 (z, y, x); "
            "open the OME-Zarr group that holds it"
        )
    return Level("", names if sorted(names) == sorted(AXES) else tuple(AXES))


def _chunk_name(metadata: dict[str, Any]) -> ChunkName:
    if metadata["zarr_format"] == 2:
        return partial(joined, "", metadata.get("dimension_separator", "."))
    encoding = metadata["chunk_key_encoding"]
    configured = encoding.get("configuration", {}) if isinstance(encoding, dict) else {}
    if isinstance(encoding, dict) and encoding["name"] == "v2":
        return partial(joined, "", configured.get("separator", "."))
    separator = configured.get("separator", "/")
    return partial(joined, "c" + separator, separator)
