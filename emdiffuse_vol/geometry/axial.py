"""Where the planes of the output lie between the measured sections of the input.

Convention: positions along z are counted in sections; plane i of the output lies at ``i / factor``, an exact
fraction, so plane 0 is section 0. A plane is *measured* where that position is a whole number. Planes and sections
outside the volume exist too, by mirroring the sections: plane -1 of factor 4 lies a quarter of the way from section 0
to section 1.

*Damaged* sections are left out: sections are addressed by their number among the *good* ones, and two good neighbours
may be 2, 3, ... sections apart, their *span*. Planes stay where they are, and lie between good neighbours:

    section    0   1   x   3   4      section 2 is damaged; the good ones are 0, 1, 3, 4, and section 3 is number 2
    plane      0 1 2 3 4 5 6 7 8      of factor 2; planes 3, 4 and 5 are bridged: t = 1/4, 1/2, 3/4 of a span of 2

Where the stack begins or ends with damaged sections, the good ones are mirrored at the first and at the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import ConfigError, GeometryError
from emdiffuse_vol.geometry.boxes import reflect

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class AxialGrid:
    """``sections`` sections, ``factor`` output planes per section (whole or fractional, above 1). ``damaged``: numbers
    of the sections that are not used, rising. ``restored``: planes on sections are predicted too, not copied."""

    sections: int
    factor: Fraction
    damaged: tuple[int, ...] = ()
    restored: bool = False

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
        good_sections(self.sections, self.damaged)

    @property
    def planes(self) -> int:
        """Planes from the first section to the last position not beyond the last one."""
        return int((self.sections - 1) * self.factor) + 1

    @cached_property
    def good(self) -> Indices:
        return good_sections(self.sections, self.damaged)

    @cached_property
    def spans(self) -> tuple[int, ...]:
        """Distances of good neighbours that occur, rising: (1,) where nothing is damaged."""
        return tuple(int(span) for span in np.unique(np.diff(self.good)))

    def locate(self, planes: Indices) -> tuple[Indices, NDArray[np.float32]]:
        """Plane numbers -> (number of the good section at or below each, relative position t in [0, 1) to the next)."""
        index, offset, span = self._find(planes)
        return index, (offset / (span * self.factor.numerator)).astype(np.float32)

    def span(self, planes: Indices) -> Indices:
        """How many sections apart the two good ones are that a plane lies between."""
        return self._find(planes)[2]

    def copied(self, planes: Indices) -> NDArray[np.bool_]:
        """Whether a plane lies on a good section, or on the mirror image of one, and is that section."""
        result: NDArray[np.bool_] = (self._find(planes)[1] == 0) & (not self.restored)
        return result

    def measured(self, planes: Indices) -> NDArray[np.bool_]:
        """Whether a plane lies on a section that is not damaged."""
        section, rest = np.divmod(planes * self.factor.denominator, self.factor.numerator)
        result: NDArray[np.bool_] = rest == 0
        if self.damaged:
            result &= ~np.isin(reflect(section, self.sections), self.damaged)
        return result

    def beyond(self, planes: Indices) -> NDArray[np.bool_]:
        """Whether a plane lies before the first or after the last good section: a mirror image, not tissue."""
        scaled, num = planes * self.factor.denominator, self.factor.numerator
        result: NDArray[np.bool_] = (scaled < self.good[0] * num) | (scaled > self.good[-1] * num)
        return result

    def bridged(self, planes: Indices) -> NDArray[np.bool_]:
        """Whether a plane would have had a nearer section, or be one itself, were none damaged."""
        lost = (self.span(planes) > 1) | self.beyond(planes)
        result: NDArray[np.bool_] = lost & ~self.measured(planes)
        return result

    @cached_property
    def _knots(self) -> Indices:
        """Positions of the good sections and of their mirror images over one period, counted from the first good one
        in units of 1 / numerator section; the next period begins at the last."""
        there = self.good - self.good[0]
        back = 2 * there[-1] - there[-2::-1]
        knots: Indices = np.concatenate([there, back]) * self.factor.numerator
        return knots

    def _find(self, planes: Indices) -> tuple[Indices, Indices, Indices]:
        """-> number of the good section at or below, distance from it in units of 1 / numerator section, span."""
        num, den = self.factor.numerator, self.factor.denominator
        knots = self._knots
        turns, rest = np.divmod(planes * den - int(self.good[0]) * num, knots[-1])
        below = np.searchsorted(knots, rest, side="right") - 1
        return turns * (len(knots) - 1) + below, rest - knots[below], (knots[below + 1] - knots[below]) // num

    def planes_between(self, first: int, last: int) -> tuple[int, int]:
        """Half-open range of planes that lie between sections ``first`` and ``last``, both included."""
        start = -((-first * self.factor.numerator) // self.factor.denominator)
        return start, int(last * self.factor) + 1


@dataclass(frozen=True)
class SectionGrid:
    """The output planes are the sections, each predicted: an :class:`AxialGrid` of factor 1. Nothing is damaged."""

    sections: int
    factor: Fraction = Fraction(1)
    damaged: tuple[int, ...] = ()
    spans: tuple[int, ...] = (1,)

    @property
    def planes(self) -> int:
        return self.sections

    @cached_property
    def good(self) -> Indices:
        return np.arange(self.sections)

    def locate(self, planes: Indices) -> tuple[Indices, NDArray[np.float32]]:
        return planes, np.zeros(len(planes), np.float32)

    def span(self, planes: Indices) -> Indices:
        return np.ones_like(planes)

    def copied(self, planes: Indices) -> NDArray[np.bool_]:
        return np.zeros(len(planes), bool)

    measured = beyond = bridged = copied

    def planes_between(self, first: int, last: int) -> tuple[int, int]:
        return first, last + 1


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


def good_sections(sections: int, damaged: tuple[int, ...]) -> Indices:
    """Numbers of the sections that are used, rising. Raises GeometryError where they are fewer than 2."""
    good = np.ones(sections, bool)
    for section in damaged:
        if not 0 <= section < sections:
            raise GeometryError(f"damaged section {section} is not in the volume, which has 0 to {sections - 1}")
        good[section] = False
    if np.count_nonzero(good) < 2:
        raise GeometryError(
            f"{len(damaged)} of {sections} sections are damaged; at least 2 good ones are needed to bridge the others"
        )
    return np.flatnonzero(good)


def parse_sections(text: str, sections: int) -> tuple[int, ...]:
    """ "17,42-44" -> (17, 42, 43, 44), rising. Raises ConfigError, or GeometryError for a section that is not there."""
    found: set[int] = set()
    for part in text.split(","):
        ends = [end.strip() for end in part.split("-")]
        if not (len(ends) <= 2 and all(end.isdecimal() for end in ends)) or int(ends[0]) > int(ends[-1]):
            raise ConfigError(f"damaged sections {text!r} are no list of numbers and ranges; give for example 17,42-44")
        if int(ends[-1]) >= sections:
            raise GeometryError(f"damaged section {ends[-1]} is not in the volume, which has 0 to {sections - 1}")
        found.update(range(int(ends[0]), int(ends[-1]) + 1))
    return tuple(sorted(found))
