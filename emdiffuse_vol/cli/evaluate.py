"""emdvol evaluate"""

from __future__ import annotations

from math import isfinite
from typing import Any

import click

from emdiffuse_vol.cli.options import channel_option


@click.command()
@click.argument("reconstruction", metavar="RECON.zarr")
@click.argument("truth", metavar="[TRUTH]", required=False)
@click.option("--factor", help="Planes per section: 10, 10.5 or 450/43.  [default: what RECON.zarr says]")
@click.option("--data-range", type=click.FloatRange(min=0, min_open=True), help="Range of greys, for float32 volumes.")
@channel_option
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write the scores to this file, too.")
def command(
    reconstruction: str,
    truth: str | None,
    factor: str | None,
    data_range: float | None,
    channel: int | None,
    json_file: str | None,
) -> None:
    """Score a reconstruction against a TRUTH of the same spacing, on the planes that were predicted.

    Prints PSNR and SSIM beside those of linear interpolation of the measured planes, and, where RECON.zarr has an
    uncertainty, the share of voxels in its 90 % interval. --channel is that of TRUTH.

    Without a TRUTH: every other section of the input is withheld, predicted with the same weights and compared; and
    the texture along z and the seams of the reconstruction are measured.
    """
    if truth is None:
        scores = _without_truth(reconstruction)
        click.echo(_plain_table(scores))
    else:
        scores = _with_truth(reconstruction, truth, factor, data_range, channel)
        click.echo(_table(scores))
    if json_file:
        _write(json_file, scores)


def _with_truth(
    reconstruction: str, truth: str, factor: str | None, data_range: float | None, channel: int | None
) -> dict[str, Any]:
    from pathlib import Path

    from rich.console import Console
    from rich.progress import Progress

    from emdiffuse_vol.evaluation.scores import evaluate
    from emdiffuse_vol.geometry.axial import AxialGrid, parse_factor
    from emdiffuse_vol.stores.metadata import read_attributes
    from emdiffuse_vol.stores.opening import open_volume

    made: dict[str, Any] = read_attributes(Path(reconstruction)).get("emdvol", {})
    geometry: dict[str, Any] = made.get("geometry", {})
    exact = parse_factor(factor or str(geometry.get("factor", "")) or _no_factor(reconstruction))
    mean = open_volume(reconstruction, channel=0)
    spread = made.get("uncertainty")
    uncertainty = open_volume(reconstruction, channel=int(spread.get("channel", 1))) if spread else None
    # Nothing here is measured in nm, so a truth that does not say its voxel size is as good.
    true = open_volume(truth, channel=channel, voxel_size=mean.spec.voxel_size)
    first = int(geometry.get("first_plane", 0))
    sections = int(geometry.get("input_sections", max(2, mean.spec.shape[0])))
    grid = AxialGrid(sections, exact, tuple(made.get("fingerprint", {}).get("damaged", ())))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Comparing", total=None)
        scores = evaluate(
            mean,
            uncertainty,
            true,
            lambda planes: ~grid.measured(planes + first),
            step=float(spread["step"]) if spread else 1.0,
            # Sections of a fractional factor lie between the planes: the output does not hold the input.
            baseline=exact.denominator == 1,
            data_range=data_range,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    return {"factor": str(exact), "sealed": bool(made.get("sealed", not made)), **scores}


def _without_truth(reconstruction: str) -> dict[str, Any]:
    from pathlib import Path

    from emdiffuse_vol.errors import InputError, WeightsError
    from emdiffuse_vol.evaluation.withheld import seams, texture, withheld
    from emdiffuse_vol.reconstruct.output import Output
    from emdiffuse_vol.stores.opening import open_volume

    output = Output(Path(reconstruction))
    job, mean = output.job(), open_volume(reconstruction, channel=0)
    scores: dict[str, Any] = {"sealed": output.sealed, **texture(mean), "seams": seams(mean, job.block)}
    settings = {"weights": job.weights, "mode": job.mode, "members": job.members, "seed": job.seed}
    if job.sampler != "one-pass":
        settings |= {"sampler": job.sampler, "steps": job.steps}
    try:
        scores["withheld"] = withheld(open_volume(job.input, **job.input_options), **settings)
    except (InputError, WeightsError) as error:
        scores |= {"withheld": None, "reason": str(error)}
    return scores


def _write(file: str, scores: dict[str, Any]) -> None:
    import json
    from pathlib import Path

    from emdiffuse_vol.errors import OutputError

    try:
        Path(file).write_text(json.dumps(_finite(scores), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}") from error


def _plain_table(scores: dict[str, Any]) -> str:
    lines = [] if scores["sealed"] else ["The reconstruction is not finished: blocks that are not there are black."]
    if test := scores["withheld"]:
        lines += [
            f"{test['sections']} sections withheld, sections {test['gap_nm']:g} nm apart, input {test['box']}",
            "",
            f"{'':<16}{'PSNR dB':>9}{'SSIM':>8}{'FSIM':>8}",
            *(
                f"{name:<16}{test[name]['psnr']:>9.2f}{test[name]['ssim']:>8.3f}{test[name]['fsim']:>8.3f}"
                for name in ("reconstruction", "linear")
            ),
            "",
            f"90 % interval holds {test['coverage']:.1%} of voxels; spread/skill {test['spread_skill']:.2f}",
        ]
    else:
        lines.append(f"No section could be withheld: {scores['reason']}")
    bands = ", ".join(f"{value:.2f} up to {band}" for band, value in scores["axial_over_lateral_power"].items())
    lines += ["", f"power along z over that along y and x, by cycles per voxel: {bands or 'too small'}"]
    found = ", ".join(f"{n} {s['ratio']:.3f} (+-{s['error']:.3f})" for n, s in scores["seams"].items())
    lines.append(f"differences at block faces over others: {found or 'one block'}")
    return "\n".join(lines)


def _no_factor(path: str) -> str:
    from emdiffuse_vol.errors import InputError

    raise InputError(f"{path} does not say its factor; give --factor, such as 10 or 450/43")


def _table(scores: dict[str, Any]) -> str:
    planes, ours, linear, spread = (scores[k] for k in ("planes", "reconstruction", "linear", "uncertainty"))
    lines = [f"{planes['missing']} missing of {planes['common']} planes, factor {scores['factor']}"]
    if (beyond := scores["truth_shape"][0] - planes["common"]) > 0:
        lines.append(f"The truth has {beyond} more planes, beyond the last section: not compared.")
    if not scores["sealed"]:
        lines.append("The reconstruction is not finished: blocks that are not there count as black.")
    lines += [
        "",
        f"{'':<16}{'PSNR dB':>9}{'SSIM':>8}",
        f"{'reconstruction':<16}{ours['psnr']:>9.2f}{ours['ssim']:>8.3f}",
    ]
    if linear:
        gain = scores["gain"]
        lines.append(f"{'linear':<16}{linear['psnr']:>9.2f}{linear['ssim']:>8.3f}")
        lines.append(f"{'gain':<16}{gain['psnr']:>+9.2f}{gain['ssim']:>+8.3f}")
    else:
        lines.append("Linear interpolation is not scored: the output does not hold all measured sections.")
    if spread:
        lines += [
            "",
            f"90 % interval holds {spread['coverage']:.1%} of voxels; spread/skill {spread['spread_skill']:.2f}",
        ]
    return "\n".join(lines)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value
