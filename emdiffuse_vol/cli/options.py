"""Option types and options that several commands share.

Convention: three numbers are z, y, x, separated by commas without spaces.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import click


class Group(click.Group):
    """Says which command may have been meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args[0] not in known and (near := get_close_matches(args[0], known, n=1)):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


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

# Settings of a run, each also a key of the JSON configuration (reconstruct.job.Request), where its default lives.
SETTINGS = (
    click.option(
        "--mode",
        help="vEMDiffuse-i or -a, EMDiffuse-n or -r, FastScan-s or -ss; or two in one pass, sections first: "
        "EMDiffuse-n+vEMDiffuse-a.  [default: vEMDiffuse-a]",
    ),
    click.option(
        "--weights",
        help="A name of `emdvol models list`, a file, or a URL#sha256=HEX; for two modes two, joined by a +.  "
        "[default: those of the mode, such as vemdiffuse-a-fast]",
    ),
    click.option(
        "--factor", help="Output planes per section: 10, 10.5 or 450/43.  [default: what makes z nearest to XY]"
    ),
    click.option("--target-voxel-size", type=float, help="Output z spacing in nm, instead of --factor."),
    click.option("--voxel-size", type=FLOATS, metavar="Z,Y,X", help="Input voxel size in nm, where the file lacks it."),
    click.option("--level", type=int, help="Resolution level of the input.  [default: 0]"),
    click.option("--channel", type=int, help="Channel of an input that has several."),
    click.option("--roi", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Region of the input to reconstruct, in its voxels."),
    click.option("--invert", is_flag=True, default=None, help="Thin structures are bright in INPUT, as in negatives."),
    click.option("--even-sections", is_flag=True, default=None, help="Even out brightness and contrast of sections."),
    click.option("--damaged", metavar="LIST", help="Sections to bridge from their neighbours: 17,42-44, or detect."),
    click.option("--mask", metavar="VOLUME", help="Volume that is 0 outside tissue; what lies there is skipped."),
    click.option(
        "--skip-empty/--no-skip-empty", default=None, help="Leave out what is constant black or white.  [default: skip]"
    ),
    click.option("--members", type=int, help="Members whose spread is the uncertainty.  [default: 4]"),
    click.option("--seed", type=int, help="Seed of the noise.  [default: 0]"),
    click.option(
        "--sampler", help="Of diffusion networks: ancestral (or legacy), ddim, dpm-solver-2m.  [default: ancestral]"
    ),
    click.option("--steps", type=int, help="Steps of diffusion networks.  [default: 200]"),
    click.option(
        "--tile", type=INTS, metavar="Z,Y,X", help="Output voxels that a network computes at once, halo aside."
    ),
    click.option("--block", type=INTS, metavar="Z,Y,X", help="Output voxels of a task; a multiple of the shard."),
    click.option("--shard", type=INTS, metavar="Z,Y,X", help="Output voxels of a file; a multiple of 64."),
    click.option("--device", help="auto, cpu, cuda or cuda:N.  [default: auto]"),
    click.option("--precision", help="auto, float32 or bfloat16.  [default: auto]"),
    click.option("--config", metavar="FILE", help="JSON file of any of these settings; flags override it."),
)


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All of SETTINGS, in their order."""
    for option in reversed(SETTINGS):
        command = option(command)
    return command
