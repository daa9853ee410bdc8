"""A box of a volume, as a volume of its own: its first voxel is the box's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from emdiffuse_vol.errors import GeometryError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.volume import Volume, VolumeSpec


@dataclass(frozen=True)
class Region:
    """``url`` and ``options`` open the whole volume."""

    url: str
    options: dict[str, Any] = field(hash=False)
    spec: VolumeSpec
    volume: Volume
    box: Box

    def read(self, box: Box) -> NDArray[Any]:
        return self.volume.read(box.shift(self.box.start))


def region_of(volume: Volume, box: Box | None) -> Volume:
    """The volume itself where ``box`` is None. Raises GeometryError for a box that is not inside it."""
    if box is None:
        return volume
    spec = volume.spec
    if box.empty or box not in Box.of(spec.shape):
        raise GeometryError(f"region {box} is not inside the volume's shape {spec.shape}; choose one that is")
    z, y, x = (o + a * s for o, a, s in zip(spec.origin, box.start, spec.voxel_size, strict=True))
    identity = spec.identity | {"region": str(box)}
    return Region(
        volume.url, volume.options, replace(spec, shape=box.shape, origin=(z, y, x), identity=identity), volume, box
    )
