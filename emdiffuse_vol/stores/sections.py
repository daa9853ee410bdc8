"""A volume without some of its sections: section k is the k-th of those that are left.

Convention: sections are addressed by their number among the good ones, as in ``geometry.axial``; y and x are the
volume's. ``url`` and ``options`` open the whole volume, damaged sections included. Only good sections are ever read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.axial import good_sections
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.volume import Volume, VolumeSpec


@dataclass(frozen=True, eq=False)
class WithoutSections:
    """good: numbers of the sections that are left."""

    url: str
    options: dict[str, Any]
    spec: VolumeSpec
    volume: Volume
    good: NDArray[np.int64]

    def read(self, box: Box) -> NDArray[Any]:
        assert box in Box.of(self.spec.shape), f"box {box} is not inside shape {self.spec.shape}"
        wanted = self.good[box.start[0] : box.stop[0]]
        # Neighbours are read together: a chunk holds several sections.
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1)
        _, *start = box.start
        _, *stop = box.stop
        parts = [
            self.volume.read(Box((int(run[0]), start[0], start[1]), (int(run[-1]) + 1, stop[0], stop[1])))
            for run in runs
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def without_sections(volume: Volume, damaged: tuple[int, ...]) -> Volume:
    """The volume itself where nothing is damaged. Raises GeometryError where fewer than 2 sections are left."""
    if not damaged:
        return volume
    spec = volume.spec
    good = good_sections(spec.shape[0], damaged)
    return WithoutSections(volume.url, volume.options, replace(spec, shape=(len(good), *spec.shape[1:])), volume, good)
