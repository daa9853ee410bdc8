"""What every mode says of a volume: the grid of its output, and which input voxels an output voxel depends on."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import GeometryError
from emdiffuse_vol.geometry.axial import AxialGrid, SectionGrid
from emdiffuse_vol.geometry.boxes import Box, Triple

Corner = tuple[float, float, float]


class Mode(Protocol):
    """``axial``: where the output's planes lie between sections. ``lateral``: output pixels for one of the input, along
    y and x; output pixel i is centred at (i + 1/2) / lateral - 1/2 input pixels. ``gap``: the distance of two sections
    in output pixels, for section-wise modes ``lateral``; ``widest`` is the largest that the network knows, and what is
    farther apart is predicted as if it were this."""

    @property
    def input_shape(self) -> Triple: ...

    @property
    def axial(self) -> AxialGrid | SectionGrid: ...

    @property
    def lateral(self) -> int: ...

    @property
    def gap(self) -> float: ...

    @property
    def widest(self) -> float: ...

    @property
    def output_shape(self) -> Triple: ...

    @property
    def stack_shape(self) -> Triple:
        """Of the good sections alone: what ``read_box`` is a box of."""
        ...

    def gaps(self, box: Box) -> NDArray[np.float32]:
        """[z] distance of the two sections that each plane lies between, in output pixels, at most ``widest``."""
        ...

    def read_box(self, box: Box) -> Box:
        """Good sections, and their pixels, that the output voxels of ``box`` depend on. May reach outside."""
        ...

    def region(self, roi: Box | None) -> Box:
        """Output voxels between the sections, and under the pixels, of an input region. Raises GeometryError."""
        ...


def coarser(box: Box, lateral: int) -> Box:
    """Input pixels that the pixels of a box lie in, along y and x; z stays as it is."""
    (a, b, c), (d, e, f) = box.start, box.stop
    return Box((a, b // lateral, c // lateral), (d, -(-e // lateral), -(-f // lateral)))


def finer(box: Box, lateral: int) -> Box:
    """Output pixels that lie in the pixels of a box, along y and x; z stays as it is."""
    (a, b, c), (d, e, f) = box.start, box.stop
    return Box((a, b * lateral, c * lateral), (d, e * lateral, f * lateral))


def finer_shape(shape: Triple, lateral: int) -> Triple:
    z, y, x = shape
    return z, y * lateral, x * lateral


def to_input(mode: Mode, corner: Corner) -> Corner:
    """A place in output voxels -> in input voxels; centres of voxels are at whole numbers in both."""
    z, *sides = corner
    y, x = ((n + 0.5) / mode.lateral - 0.5 for n in sides)
    return z / float(mode.axial.factor), y, x


def check_roi(roi: Box, shape: Triple) -> None:
    if roi.empty or roi not in Box.of(shape):
        z, y, x = shape
        raise GeometryError(f"--roi {roi} is not inside the input, which is 0:{z},0:{y},0:{x}")
