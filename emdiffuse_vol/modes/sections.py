"""EMDiffuse-n and -r: every section restored where it is, with as many pixels or more.

Convention: the output has the input's sections, and ``lateral`` output pixels for one of the input along y and x. A
section is computed from itself and ``context`` sections on either side; at the ends of the stack these are mirrored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.axial import SectionGrid
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.modes.mode import check_roi, coarser, finer, finer_shape


@dataclass(frozen=True)
class SectionWise:
    input_shape: Triple
    lateral: int = 1
    context: int = 0

    @cached_property
    def axial(self) -> SectionGrid:
        return SectionGrid(self.input_shape[0])

    @property
    def gap(self) -> float:
        return float(self.lateral)

    widest = gap

    @property
    def output_shape(self) -> Triple:
        return finer_shape(self.input_shape, self.lateral)

    @property
    def stack_shape(self) -> Triple:
        return self.input_shape

    def gaps(self, box: Box) -> NDArray[np.float32]:
        return np.full(box.shape[0], self.gap, np.float32)

    def read_box(self, box: Box) -> Box:
        return coarser(box, self.lateral).grow((self.context, 0, 0))

    def region(self, roi: Box | None) -> Box:
        if roi is None:
            return Box.of(self.output_shape)
        check_roi(roi, self.input_shape)
        return finer(roi, self.lateral)
