"""vEMDiffuse: planes at the target spacing between the sections of an anisotropic stack.

Convention: the output grid is the input's in y and x; along z it is an :class:`AxialGrid`. A plane is computed from
the two sections on either side of it, ``CONTEXT`` = (1, 2): one below the section at or below the plane, two above
it. Sections are addressed by their number among the good ones; ``read_box`` counts along z in these.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import inf
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import GeometryError
from emdiffuse_vol.geometry.axial import AxialGrid, exact_ratio
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.modes.mode import check_roi

CONTEXT = (1, 2)


@dataclass(frozen=True)
class Isotropic:
    """What the mode means for one volume. ``gap`` is the distance of two sections in lateral pixels; ``widest`` is the
    largest that the network knows, and what is farther apart is predicted as if it were this."""

    input_shape: Triple
    axial: AxialGrid
    gap: float
    widest: float = inf
    lateral: ClassVar[int] = 1

    @property
    def output_shape(self) -> Triple:
        return (self.axial.planes, *self.input_shape[1:])

    @property
    def stack_shape(self) -> Triple:
        return (len(self.axial.good), *self.input_shape[1:])

    def gaps(self, box: Box) -> NDArray[np.float32]:
        span = self.axial.span(np.arange(box.start[0], box.stop[0]))
        gaps: NDArray[np.float32] = np.minimum(span * self.gap, max(self.widest, self.gap)).astype(np.float32)
        return gaps

    def read_box(self, box: Box) -> Box:
        index, _ = self.axial.locate(np.array([box.start[0], box.stop[0] - 1]))
        below, above = CONTEXT
        return Box(
            (int(index[0]) - below, *box.start[1:]),
            (int(index[1]) + above + 1, *box.stop[1:]),
        )

    def region(self, roi: Box | None) -> Box:
        if roi is None:
            return Box.of(self.output_shape)
        check_roi(roi, self.input_shape)
        start, stop = self.axial.planes_between(roi.start[0], roi.stop[0] - 1)
        if stop <= start:
            raise GeometryError(f"--roi {roi} holds no plane of the output; take at least two sections")
        return Box((start, *roi.start[1:]), (stop, *roi.stop[1:]))


def isotropic_mode(
    shape: Triple,
    voxel_size: tuple[float, float, float],
    factor: Fraction | None = None,
    target: float | None = None,
    damaged: tuple[int, ...] = (),
) -> Isotropic:
    """Choose the factor: given, or from a target spacing in nm, or the whole number that makes z nearest to XY.

    damaged: sections to leave out. Raises GeometryError where z is finer than XY, where one section is no stack, or
    where a factor makes no planes.
    """
    z, y, x = voxel_size
    lateral = (y + x) / 2
    if z <= lateral:
        raise GeometryError(
            f"sections are {z:g} nm apart and pixels {lateral:g} nm wide: z is already as fine as XY; check the voxel "
            f"size, or give the true one with --voxel-size"
        )
    if factor is not None and target is not None:
        raise GeometryError("--factor and --target-voxel-size both set the spacing; give one of them")
    if target is not None:
        if not 0 < target < z:
            raise GeometryError(
                f"--target-voxel-size {target:g} nm must lie between 0 and the section spacing, {z:g} nm"
            )
        factor = exact_ratio(z, target)
    if factor is None:
        factor = Fraction(max(2, round(z / lateral)))
    return Isotropic(shape, AxialGrid(shape[0], factor, damaged), z / lateral)
