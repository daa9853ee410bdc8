"""Option types and options that several commands share.

Convention: three numbers are z, y, x, separated by commas without spaces.
"""

from __future__ import annotations

from typing import Any

import click


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


INTS, FLOATS = Triple(int), Triple(float)

voxel_size_option = click.option(
    "--voxel-size", type=FLOATS, help="Voxel size in nanometres; overrides what the files say."
)
level_option = click.option(
    "--level", type=click.IntRange(min=0), default=0, show_default=True, help="Pyramid level of an OME-Zarr."
)
channel_option = click.option("--channel", type=click.IntRange(min=0), help="Channel of an OME-Zarr that has several.")
