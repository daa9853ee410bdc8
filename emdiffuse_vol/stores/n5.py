"""Reading N5: an array, or a group of arrays s0, s1, ... each coarser than the one before.

Convention: N5 counts axes from the fastest, so its arrays are x, y, z, or x, y, z, c with four axes, unless the
attribute ``axes`` says otherwise. Voxel sizes are looked for where Java and Python tools put them: ``pixelResolution``
(BigDataViewer), ``transform`` (COSEM), ``resolution`` with ``units``; in the array, then in its group, there times the
``downsamplingFactors`` of the level.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import AXES
from emdiffuse_vol.stores.chunked import (
    ChunkedVolume,
    check_array,
    chunked_volume,
    joined,
    open_chunked,
    voxel_size_of,
)
from emdiffuse_vol.stores.kvstore import absolute, inside, kvstore, read_json
from emdiffuse_vol.stores.units import nanometres
from emdiffuse_vol.stores.volume import Nanometres

KEY = "attributes.json"
Position = tuple[Nanometres | None, Nanometres]  # voxel size and origin


def open_n5(
    url: str, *, voxel_size: Nanometres | None = None, level: int = 0, channel: int | str | None = None
) -> ChunkedVolume:
    """``voxel_size`` overrides the attributes. Raises InputError."""
    url = absolute(url)
    name = url.rsplit("/", 1)[-1]
    group = read_json(url, KEY) or {}
    path = "" if "dimensions" in group else _level_path(url, name, group, level)
    if level and not path:
        raise InputError(f"{name} is a single N5 array, found level {level}; leave --level out")
    attributes = (read_json(f"{url}/{path}", KEY) or {}) if path else group
    name = f"{name}/{path}".rstrip("/")
    array = open_chunked(name, {"driver": "n5", "kvstore": kvstore(url, path)})
    check_array(name, array)
    axes = _axes(name, array.rank, tuple(array.domain.labels))
    try:
        stored, origin = _position(attributes)
        stored = stored or voxel_size_of(array, axes)
        if stored is None and path:
            stored, origin = _position(group)
            stored = stored and _coarser(stored, attributes.get("downsamplingFactors", [2**level] * 3))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{name} has N5 attributes that make no sense: {error!r}; correct them") from error
    return chunked_volume(
        url,
        {"voxel_size": voxel_size, "level": level, "channel": channel},
        name,
        array,
        axes,
        voxel_size=voxel_size or stored,
        origin=origin,
        format="N5",
        digested=[attributes, path],
        chunk_name=partial(joined, "", "/"),
    )


def _level_path(url: str, name: str, group: dict[str, Any], level: int) -> str:
    """Of level ``level`` in a group. Raises InputError where there is none."""
    path = f"s{level}"
    multiscales = group.get("multiscales")
    if isinstance(multiscales, list) and multiscales:
        try:
            path = inside(name, multiscales[0]["datasets"][level]["path"])
        except (LookupError, TypeError) as error:
            raise InputError(f"{name} has no level {level} among its multiscales; choose another --level") from error
    if "dimensions" not in (read_json(f"{url}/{path}", KEY) or {}):
        raise InputError(
            f"{name} is an N5 group without level {level}, {path}; give --level, or the path of an array in it"
        )
    return path


def _axes(name: str, rank: int, labels: tuple[str, ...]) -> tuple[str, ...]:
    known = tuple("c" if label.lower() in ("c", "channel") else label.lower() for label in labels)
    if sorted(a for a in known if a in AXES and a) == sorted(AXES):
        return known
    if rank not in (3, 4) or any(labels):
        raise InputError(f"{name} has axes {labels}, expected x, y, z or x, y, z, c; correct its metadata")
    return ("x", "y", "z", "c")[:rank]


def _position(attributes: dict[str, Any]) -> Position:
    """Voxel size, where stated, and origin, in nm, z y x."""
    nowhere = (0.0, 0.0, 0.0)
    if isinstance(transform := attributes.get("transform"), dict):
        order = [str(a) for a in transform["axes"]]
        units = [_unit(u) for u in transform["units"]]
        scale = [float(s) * u for s, u in zip(transform["scale"], units, strict=True)]
        shift = [float(s) * u for s, u in zip(transform.get("translate", [0.0] * len(order)), units, strict=True)]
        z, y, x = (order.index(a) for a in AXES)
        return (scale[z], scale[y], scale[x]), (shift[z], shift[y], shift[x])
    if isinstance(pixel := attributes.get("pixelResolution"), dict):
        return _reversed(pixel["dimensions"], _unit(pixel.get("unit", "nm"))), nowhere
    if isinstance(pixel, list):
        return _reversed(pixel, 1.0), nowhere
    if "resolution" in attributes and "units" not in attributes:
        return _reversed(attributes["resolution"], 1.0), nowhere
    return None, nowhere


def _reversed(values: list[Any], nm: float) -> Nanometres:
    x, y, z = (float(v) * nm for v in values[:3])
    return z, y, x


def _coarser(size: Nanometres, factors: list[Any]) -> Nanometres:
    z, y, x = (s * f for s, f in zip(size, _reversed(factors, 1.0), strict=True))
    return z, y, x


def _unit(name: Any) -> float:
    if (nm := nanometres(str(name))) is None:
        raise ValueError(f"unit {name}")
    return nm
