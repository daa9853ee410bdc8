"""Tiles: the unit of computing, on one global grid that does not depend on how work is divided.

Convention: tile (k, j, i) owns the cell [k, k+1) x [j, j+1) x [i, i+1) times ``core`` of the output, and the network
computes that cell grown by ``halo``. What it computes in the halo is either thrown away (``blend`` False: the network
sees nothing beyond the halo, so the cell is exact), or faded into its neighbours' (``blend`` True: networks with
global context; halves of the overlaps lie on either side of the cell border):

    blend False     |halo|------ core ------|halo|           cells butt against each other
    blend True      /‾‾‾‾‾\\------ core ------/‾‾‾‾‾\\           ramps over 2 * halo, summing to 1 with the neighbour's
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Box, Triple, ceil_div, cell_box, cells_meeting


@dataclass(frozen=True)
class Tiling:
    """Tiles of a network; z cells are never blended (``halo[0]`` must be 0 where ``blend`` is set)."""

    core: Triple
    halo: Triple
    blend: bool = False

    def __post_init__(self) -> None:
        assert not (self.blend and self.halo[0]), "tiles are blended in y and x only"

    @property
    def shape(self) -> Triple:
        """What the network computes at once."""
        z, y, x = (c + 2 * h for c, h in zip(self.core, self.halo, strict=True))
        return z, y, x

    def input_box(self, index: Triple) -> Box:
        return cell_box(index, self.core).grow(self.halo)

    def reach_box(self, index: Triple) -> Box:
        """Voxels of the output that the tile contributes to."""
        return self.reach_of(self.input_box(index))

    def reach_of(self, box: Box) -> Box:
        """The same of the tile whose input box this is."""
        z, y, x = self.halo
        return box if self.blend else box.grow((-z, -y, -x))

    def tiles_for(self, box: Box) -> Iterator[Triple]:
        """Tiles that contribute to ``box``, in z y x order."""
        return cells_meeting(box.grow(self.halo) if self.blend else box, self.core)

    def window(self) -> NDArray[np.float32]:
        """[z, y, x] weight of each voxel that the tile contributes to; over all tiles they sum to 1 at every voxel."""
        z, y, x = (ramp_window(c, h, self.blend) for c, h in zip(self.core, self.halo, strict=True))
        window: NDArray[np.float32] = z[:, None, None] * y[:, None] * x
        return window

    def fitted(self, shape: Triple, stride: Triple) -> Tiling:
        """The same tiling with cells no larger than a small volume needs; cells stay multiples of ``stride``."""
        z, y, x = (min(c, ceil_div(n, s) * s) for c, n, s in zip(self.core, shape, stride, strict=True))
        return Tiling((z, y, x), self.halo, self.blend)


def ramp_window(core: int, halo: int, blend: bool) -> NDArray[np.float32]:
    """Weights along one axis: 1 in the core, or between linear ramps over 2 * halo around its ends."""
    window = np.ones(core + 2 * halo * blend, np.float32)
    if blend and halo:
        ramp = ((np.arange(2 * halo) + 0.5) / (2 * halo)).astype(np.float32)
        window[: 2 * halo] = ramp
        window[core:] = 1 - ramp
    return window
