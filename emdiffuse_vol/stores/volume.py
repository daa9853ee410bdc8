"""What a volume is, whatever the format behind it.

Convention: axes z y x; voxel size and origin in nanometres, floats; ``origin`` is the centre of voxel (0, 0, 0), as
in OME-NGFF. ``read`` takes a box inside the volume and returns the stored greys, unscaled, in the stored dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Box, Triple, reflect

Nanometres = tuple[float, float, float]
DTYPES = ("uint8", "uint16", "int16", "float32")


@dataclass(frozen=True)
class VolumeSpec:
    """shape in voxels; dtype one of DTYPES; identity: JSON values that change when the data are others (format, shape,
    dtype, voxel size, digest of the metadata or of file names and sizes), without the path, so data may move."""

    shape: Triple
    dtype: str
    voxel_size: Nanometres
    origin: Nanometres = (0.0, 0.0, 0.0)
    chunk: Triple | None = None
    identity: dict[str, Any] = field(default_factory=dict, hash=False)


class Volume(Protocol):
    """A 3D grey image. ``url`` and the keyword arguments in ``options`` open it again with ``open_volume``, in
    another process."""

    @property
    def url(self) -> str: ...

    @property
    def options(self) -> dict[str, Any]: ...

    @property
    def spec(self) -> VolumeSpec: ...

    def read(self, box: Box) -> NDArray[Any]:
        """Greys of a box inside the volume. Raises InputError naming the damaged chunk or file."""
        ...


def mirror_source(box: Box, shape: Triple) -> Box:
    """The part of a volume that ``box``, which may reach outside, mirrors: see :func:`mirror_into`."""
    start, stop = zip(*((int(i.min()), int(i.max()) + 1) for i in _mirrored(box, shape)), strict=True)
    return Box(start, stop)


def mirror_into(greys: NDArray[Any], source: Box, box: Box, shape: Triple) -> NDArray[Any]:
    """Greys of ``source`` -> greys of ``box``, mirrored at the faces of the volume."""
    for axis, (index, first) in enumerate(zip(_mirrored(box, shape), source.start, strict=True)):
        if not np.array_equal(index - first, np.arange(greys.shape[axis])):
            greys = np.take(greys, index - first, axis=axis)
    return greys


def read_mirrored(volume: Volume, box: Box) -> NDArray[Any]:
    """Greys of a box that may reach outside the volume. Each voxel is read once."""
    source = mirror_source(box, volume.spec.shape)
    return mirror_into(volume.read(source), source, box, volume.spec.shape)


def _mirrored(box: Box, shape: Triple) -> list[NDArray[np.int64]]:
    return [reflect(np.arange(a, b), n) for a, b, n in zip(box.start, box.stop, shape, strict=True)]
