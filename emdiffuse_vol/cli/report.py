"""`emdvol report`: what came out of a run, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


def place(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int, int] | None:
    """``Z,Y,X`` -> a voxel."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r}: expected a voxel Z,Y,X such as 48,64,64", ctx, param)
    z, y, x = map(int, parts)
    return z, y, x


@click.command()
@click.argument("output", metavar="ISO.zarr", type=click.Path(path_type=Path))
@click.option("--with", "input", metavar="INPUT", help="Where the input is now.  [default: where the run read it]")
@click.option(
    "--truth", metavar="VOLUME", help="Isotropic truth on the grid of ISO.zarr: adds scores and its pictures."
)
@click.option("--at", metavar="Z,Y,X", callback=place, help="Voxel of ISO.zarr to show.  [default: near its middle]")
@click.option(
    "--size", type=click.IntRange(16, 2048), default=256, show_default=True, help="Voxels along a crop's edge."
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.12,
    show_default=True,
    help="Blocks whose 99th percentile of the uncertainty is below are reliable; greys from 0 to 1.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The page; a .json file of the same name goes beside it.",
)
def command(
    output: Path,
    input: str | None,
    truth: str | None,
    at: tuple[int, int, int] | None,
    size: int,
    threshold: float,
    out: Path,
) -> None:
    """Write a page about ISO.zarr that needs nothing else: pictures before and after, reliability, what failed, speed,
    scores where --truth is given, provenance, and a methods paragraph. Works while the run goes on, too."""
    from emdiffuse_vol.viewing.charts import check_matplotlib
    from emdiffuse_vol.viewing.report import Asked, write_report

    check_matplotlib()
    if out.suffix not in (".html", ".htm"):
        raise click.BadParameter(f"{out}: expected a name that ends in .html", param_hint="--out")
    asked = Asked(input, truth, at, size, threshold)
    page, numbers = write_report(output, out, asked, _scores(output, truth) if truth else None)
    click.echo(f"wrote {page} and {numbers}")


def _scores(output: Path, truth: str) -> dict[str, Any]:
    from emdiffuse_vol.cli.progress import counting
    from emdiffuse_vol.evaluation.scores import evaluate
    from emdiffuse_vol.viewing.crops import Shown, open_truth

    shown = Shown(output)
    first = shown.job.plan.region.start[0]
    with counting("Comparing", transient=True) as progress:
        return evaluate(
            shown.mean_volume,
            shown.codes_volume,
            open_truth(shown, truth),
            lambda planes: ~shown.axial.measured(planes + first),
            step=float(shown.made["uncertainty"]["step"]),
            baseline=shown.axial.factor.denominator == 1,
            data_range=None if shown.mean_volume.spec.dtype != "float32" else shown.unit,
            progress=progress,
        )
