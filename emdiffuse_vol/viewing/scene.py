"""What neuroglancer shows of an output: its state, as JSON, with input, mean and uncertainty side by side.

Convention: one space in nanometres with axes x y z, in which a voxel lies *around* the place its metadata give
(OME-NGFF: a translation is of the first voxel's centre), so that sections and planes of different thickness meet where
they should. The two channels of an output are a channel dimension ``c^``, which shaders read both. XY above, XZ below;
a column for each layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from emdiffuse_vol.geometry.boxes import AXES, Triple
from emdiffuse_vol.stores.volume import Nanometres

PUBLIC_VIEWER = "https://neuroglancer-demo.appspot.com/"
FIELD = 512  # voxels across a panel, at most
PANEL = 480  # pixels that a panel is about wide
NM = 1e-9

GREY = """#uicontrol invlerp contrast(range=[{low:g}, {high:g}], window=[{least:g}, {most:g}])
void main() {{
  emitGrayscale(contrast({value}));
}}
"""

UNCERTAINTY = """// Uncertainty on a grey scale from 0 to 1; light blue above the threshold.
#uicontrol float threshold slider(min=0.005, max={most:.4g}, default={threshold:g}, step=0.005)
vec3 flame(float t) {{
  vec3 colour = mix(vec3(0.0, 0.0, 0.02), vec3(0.34, 0.06, 0.43), smoothstep(0.0, 0.3, t));
  colour = mix(colour, vec3(0.73, 0.21, 0.33), smoothstep(0.25, 0.55, t));
  colour = mix(colour, vec3(0.98, 0.55, 0.04), smoothstep(0.5, 0.8, t));
  return mix(colour, vec3(0.99, 1.0, 0.64), smoothstep(0.75, 1.0, t));
}}
void main() {{
  float uncertainty = float(toRaw(getDataValue({channel}))) * {scale:.8g};
  emitRGB(uncertainty > threshold ? vec3(0.13, 0.83, 0.93) : flame(uncertainty / threshold));
}}
"""


@dataclass(frozen=True)
class Source:
    """url: of a Zarr, as the browser is to fetch it; axes: as stored; fixed: index along axes other than z, y, x."""

    url: str
    voxel_size: Nanometres
    origin: Nanometres
    axes: Sequence[str] = AXES
    fixed: Sequence[int | None] = (None, None, None)


@dataclass(frozen=True)
class Made:
    """What is known of an output. greys: shown as black and white; window: the range of its dtype that is worth
    choosing from; step: greys per code of the uncertainty; unit: greys from 0 to 1 of thresholds; channel: of the
    uncertainty."""

    source: Source
    shape: Triple
    greys: tuple[float, float]
    window: tuple[float, float]
    step: float
    unit: float
    channel: int = 1


def scene(made: Made, before: Source | None, point: Triple, threshold: float) -> dict[str, Any]:
    """A state of neuroglancer. point: voxel of the output in the middle of every panel."""
    size, origin = made.source.voxel_size, made.source.origin
    (low, high), (least, most) = made.greys, made.window
    greys = {"low": low, "high": high, "least": least, "most": most}
    layers = []
    if before is not None:
        layers.append(_layer("input", before, GREY.format(**greys, value="getDataValue()")))
    layers.append(_layer("reconstruction", made.source, GREY.format(**greys, value="getDataValue(0)")))
    slider = max(0.25, 2 * threshold)
    shader = UNCERTAINTY.format(most=slider, threshold=threshold, scale=made.step / made.unit, channel=made.channel)
    layers.append(_layer("uncertainty", made.source, shader))
    names = [layer["name"] for layer in layers]

    def panels(layout: str) -> dict[str, Any]:
        return {
            "type": "row",
            "children": [{"type": "viewer", "layers": [name], "layout": layout} for name in names],
        }

    field = min(FIELD, max(made.shape[1:]))
    return {
        "dimensions": {axis: [size[AXES.index(axis)] * NM, "m"] for axis in "xyz"},
        "position": [point[i] + origin[i] / size[i] for i in (2, 1, 0)],
        "crossSectionScale": field / PANEL,
        "layers": layers,
        "layout": {"type": "column", "children": [panels("xy"), panels("xz")]},
        "showDefaultAnnotations": False,
        "showSlices": False,
        "selectedLayer": {"layer": "uncertainty", "visible": True},
    }


def _layer(name: str, source: Source, shader: str) -> dict[str, Any]:
    layer = {
        "type": "image",
        "name": name,
        "source": {"url": f"zarr://{source.url}", "transform": _transform(source)},
        "shader": shader,
        "opacity": 1,
        "blend": "default",
    }
    if fixed := _fixed(source):
        layer["localPosition"] = [index + 0.5 for index in fixed]
    return layer


def _names(source: Source) -> list[str]:
    """Of dimensions: spatial ones are global, ``c^`` is for shaders, and what is fixed is local to the layer."""
    names = []
    for axis, index in zip(source.axes, source.fixed, strict=True):
        if axis in AXES:
            names.append(axis)
        else:
            names.append("c^" if index is None else f"{axis}'")
    return names


def _fixed(source: Source) -> list[int]:
    return [
        index for axis, index in zip(source.axes, source.fixed, strict=True) if axis not in AXES and index is not None
    ]


def _transform(source: Source) -> dict[str, Any]:
    """Names and sizes of the dimensions. No matrix: that of neuroglancer has the centre of voxel i at origin + i."""
    dimensions = {
        name: [source.voxel_size[AXES.index(axis)] * NM, "m"] if axis in AXES else [1, ""]
        for name, axis in zip(_names(source), source.axes, strict=True)
    }
    transform = {"outputDimensions": dimensions}
    if set(source.axes) == set(AXES):
        # The voxel size is ours, also where the metadata have another. With channels, neuroglancer would no longer give
        # all of them to shaders.
        transform["inputDimensions"] = dimensions
    return transform


def link(state: dict[str, Any], viewer: str = PUBLIC_VIEWER) -> str:
    """A URL that opens a state in a neuroglancer that anybody can reach."""
    return f"{viewer}#!{quote(json.dumps(state, separators=(',', ':')), safe='')}"
