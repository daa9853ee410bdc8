"""Where the planes of the output lie between the measured sections of the input.

Convention: positions along z are counted in sections; plane i of the output lies at ``i / factor``, an exact
fraction, so plane 0 is section 0. A plane is *measured* where that position is a whole number. Planes and sections
outside the volume exist too, by mirroring the sections: plane -1 of factor 4 lies a quarter of the way from section 0
to section 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import GeometryError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class AxialGrid:
    """``sections`` measured sections, ``factor`` output planes per section (whole or fractional, above 1)."""

    sections: int
    factor: Fraction

    def __post_init__(self) -> None:
        if self.sections < 2:
            raise GeometryError(
                f"the volume has {self.sections} section; at least 2 are needed to predict what lies between them"
            )
        if self.factor <= 1:
            raise GeometryError(f"factor {self.factor} makes no new planes; give a --factor above 1")
        if self.factor > 1000 or self.factor.denominator > 10**6:
            raise GeometryError(
                f"factor {float(self.factor):g} is no plain number up to 1000; give for example 10, 10.5 or 450/43"
            )

    @property
    def planes(self) -> int:
        """Planes from the first measured section to the last position not beyond the last one."""
        return int((self.sections - 1) * self.factor) + 1

    def locate(self, planes: Indices) -> tuple[Indices, NDArray[np.float32]]:
        """Plane numbers -> (section at or below each, relative position t in [0, 1) towards the next)."""
        num, den = self.factor.numerator, self.factor.denominator
        scaled = planes * den
        return scaled // num, ((scaled % num) / num).astype(np.float32)

    def measured(self, planes: Indices) -> NDArray[np.bool_]:
        result: NDArray[np.bool_] = (planes * self.factor.denominator) % self.factor.numerator == 0
        return result

    def planes_between(self, first: int, last: int) -> tuple[int, int]:
        """Half-open range of planes that lie between sections ``first`` and ``last``, both included."""
        start = -((-first * self.factor.numerator) // self.factor.denominator)
        return start, int(last * self.factor) + 1


def parse_factor(text: str) -> Fraction:
    """ "10", "10.5" or "450/43" -> the exact fraction. Raises GeometryError."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise GeometryError(f"factor {text!r} is not a number; give for example 10, 10.5 or 450/43") from None


def exact_ratio(coarse: float, fine: float) -> Fraction:
    """Ratio of two voxel sizes as written in decimals: 45.0, 4.3 -> 450/43; noise of float32 metadata is dropped."""
    if round(fine, 4) <= 0:
        raise GeometryError(f"a voxel size of {fine:g} nm is no size; give at least 0.0001 nm")
    return Fraction(str(round(coarse, 4))) / Fraction(str(round(fine, 4)))
