"""Sections restored, then planes predicted between them, in one pass: EMDiffuse-n+vEMDiffuse-a and its like.

Convention: the output grid is that of the second mode on the output of the first. What the second needs of the restored
sections, the first computes from the input with ``halo`` more input pixels around, which is as far as it sees; so a
tile depends on its place alone, and no volume lies between the two. Planes on sections are restored sections.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.axial import AxialGrid
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.modes.isotropic import Isotropic
from emdiffuse_vol.modes.mode import check_roi, finer
from emdiffuse_vol.modes.sections import SectionWise


@dataclass(frozen=True)
class Chain:
    """first: of the input's good sections; then: of what that makes; halo: input pixels that the first sees far."""

    input_shape: Triple
    first: SectionWise
    then: Isotropic
    halo: int

    @cached_property
    def axial(self) -> AxialGrid:
        return replace(self.then.axial, restored=True)

    @property
    def lateral(self) -> int:
        return self.first.lateral

    @property
    def gap(self) -> float:
        return self.then.gap

    @property
    def widest(self) -> float:
        return self.then.widest

    @property
    def output_shape(self) -> Triple:
        return self.then.output_shape

    @property
    def stack_shape(self) -> Triple:
        return self.first.input_shape

    def gaps(self, box: Box) -> NDArray[np.float32]:
        return self.then.gaps(box)

    def read_box(self, box: Box) -> Box:
        return self.first.read_box(self.then.read_box(box)).grow((0, self.halo, self.halo))

    def region(self, roi: Box | None) -> Box:
        if roi is not None:
            check_roi(roi, self.input_shape)
            roi = finer(roi, self.lateral)
        return self.then.region(roi)
