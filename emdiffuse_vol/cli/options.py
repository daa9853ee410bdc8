"""Option types and options that several commands share.

Convention: three numbers are z, y, x, separated by commas without spaces; a region is half-open, in voxels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from emdiffuse_vol.geometry.boxes import Box


class Triple(click.ParamType):  # type: ignore[type-arg]
    """``Z,Y,X`` -> three positive numbers of one kind."""

    name = "Z,Y,X"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != 3 or not all(0 < n < float("inf") for n in numbers):
            what = "whole numbers" if self.kind is int else "numbers"
            self.fail(f"{value!r}: expected three positive {what} Z,Y,X such as 64,128,128", param, ctx)
        return numbers


class Roi(click.ParamType):  # type: ignore[type-arg]
    """``z0:z1,y0:y1,x0:x1`` -> Box."""

    name = "z0:z1,y0:y1,x0:x1"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Box:
        from emdiffuse_vol.geometry.boxes import Box

        if isinstance(value, Box):
            return value
        try:
            (a, d), (b, e), (c, f) = ((int(n) for n in part.split(":")) for part in str(value).split(","))
            box = Box((a, b, c), (d, e, f))
        except ValueError:
            self.fail(f"{value!r}: expected z0:z1,y0:y1,x0:x1 such as 0:64,512:1024,512:1024", param, ctx)
        if box.empty or min(box.start) < 0:
            self.fail(f"{value!r} holds no voxels of a volume: expected 0 <= start < stop on each axis", param, ctx)
        return box


INTS, FLOATS, ROI = Triple(int), Triple(float), Roi()

voxel_size_option = click.option(
    "--voxel-size", type=FLOATS, help="Voxel size in nanometres; overrides what the files say."
)
level_option = click.option(
    "--level", type=click.IntRange(min=0), default=0, show_default=True, help="Pyramid level of an OME-Zarr."
)
channel_option = click.option("--channel", type=click.IntRange(min=0), help="Channel of an OME-Zarr that has several.")
