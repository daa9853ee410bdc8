"""A box of a volume, as a volume of its own: its first voxel is the box's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from emdiffuse_vol.errors import GeometryError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.volume import Volume, VolumeSpec


@dataclass(frozen=True)
class Region:
    """``url`` and ``options`` open the whole volume."""

    volume: Volume
    box: Box

    @property
    def url(self) -> str:
        return self.volume.url

    @property
    def options(self) -> dict[str, Any]:
        return self.volume.options

    @cached_property
    def spec(self) -> VolumeSpec:
        spec = self.volume.spec
        z, y, x = (o + a * s for o, a, s in zip(spec.origin, self.box.start, spec.voxel_size, strict=True))
        identity = spec.identity | {"region": str(self.box)}
        return replace(spec, shape=self.box.shape, origin=(z, y, x), identity=identity)

    def read(self, box: Box) -> NDArray[Any]:
        return self.volume.read(box.shift(self.box.start))


def region_of(volume: Volume, box: Box | None) -> Volume:
    """The volume itself where ``box`` is None. Raises GeometryError for a box that is not inside it."""
    if box is None:
        return volume
    if box.empty or box not in Box.of(volume.spec.shape):
        raise GeometryError(f"region {box} is not inside the volume's shape {volume.spec.shape}; choose one that is")
    return Region(volume, box)
