"""emdvol evaluate"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import click

from emdiffuse_vol.cli.options import channel_option


@click.command()
@click.argument("reconstruction", metavar="RECON.zarr")
@click.argument("truth", metavar="[TRUTH]", required=False)
@click.option("--factor", help="Planes per section: 10, 10.5 or 450/43.  [default: what RECON.zarr says]")
@click.option("--data-range", type=click.FloatRange(min=0, min_open=True), help="Range of greys, for float32 volumes.")
@channel_option
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="File for the scores; -: print them.",
)
@click.option(
    "--plots", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False), help="Draw the curves of the scores."
)
@click.option("--lpips", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Weights of LPIPS.")
def command(
    reconstruction: str,
    truth: str | None,
    factor: str | None,
    data_range: float | None,
    channel: int | None,
    json_file: str | None,
    plots: Path | None,
    lpips: Path | None,
) -> None:
    """Score a reconstruction against a TRUTH of the same spacing, on the planes that were predicted.

    Prints PSNR and SSIM beside those of linear interpolation of the measured planes, and, where RECON.zarr has an
    uncertainty, the share of voxels in its 90 % interval and the CRPS; these are of every voxel. FSIM, LPIPS,
    resolution and detail along z are of up to eight regions. --channel is that of TRUTH.

    Without a TRUTH: every other section of the input is withheld, predicted with the same weights and compared; and
    the texture along z and the seams of the reconstruction are measured.
    """
    if truth is None:
        if plots or lpips:
            raise click.UsageError("--plots and --lpips are for scores against a TRUTH; give one")
        scores, table = _without_truth(reconstruction), _plain_table
    else:
        if plots:
            from emdiffuse_vol.viewing.charts import check_matplotlib

            check_matplotlib()
        scores, table = _with_truth(reconstruction, truth, factor, data_range, channel, lpips), _table
    if json_file != "-":
        click.echo(table(scores))
    if json_file:
        _write(json_file, scores)
    if plots:
        from emdiffuse_vol.viewing.curves import draw_scores

        for file in draw_scores(scores, plots):
            click.echo(f"wrote {file}", err=True)


def _with_truth(
    reconstruction: str,
    truth: str,
    factor: str | None,
    data_range: float | None,
    channel: int | None,
    lpips: Path | None,
) -> dict[str, Any]:
    import numpy as np

    from emdiffuse_vol.cli.progress import counting
    from emdiffuse_vol.evaluation.detail import detail
    from emdiffuse_vol.evaluation.scores import common_planes, evaluate
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
    missing = ~grid.measured(np.arange(common_planes(mean, true)) + first)
    # Sections of a fractional factor lie between the planes: the output does not hold the input.
    baseline = exact.denominator == 1
    network = _lpips(lpips)
    with counting("Comparing", transient=True) as progress:
        scores = evaluate(
            mean,
            uncertainty,
            true,
            missing,
            step=float(spread["step"]) if spread else 1.0,
            baseline=baseline,
            data_range=data_range,
            progress=progress,
        )
    with counting("Looking at detail", transient=True) as progress:
        scores["detail"] = detail(
            mean,
            true,
            missing,
            data_range=scores["data_range"],
            baseline=baseline,
            lpips=network,
            progress=progress,
        )
    return {"factor": str(exact), "sealed": bool(made.get("sealed", not made)), **scores}


def _lpips(file: Path | None) -> Any:
    """The network of LPIPS; None where its weights are neither given nor in their place."""
    from emdiffuse_vol.errors import WeightsError
    from emdiffuse_vol.metrics.perceptual import Lpips
    from emdiffuse_vol.models.registry import folder

    place = file or folder() / "metrics" / "lpips-alex.safetensors"
    if file is None and not place.is_file():
        return None
    try:
        return Lpips.load(place)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{place}: {error}; benchmarks/lpips_offline.py makes it") from error


def _without_truth(reconstruction: str) -> dict[str, Any]:
    from emdiffuse_vol.errors import InputError, WeightsError
    from emdiffuse_vol.evaluation.withheld import seams, texture, withheld
    from emdiffuse_vol.reconstruct.output import Output
    from emdiffuse_vol.stores.opening import open_volume

    output = Output(Path(reconstruction))
    job, mean = output.job(), open_volume(reconstruction, channel=0)
    scores: dict[str, Any] = {"sealed": output.sealed, **texture(mean), "seams": seams(mean, job.block)}
    settings = {"weights": job.weights, "mode": job.mode, "members": job.members, "seed": job.seed}
    settings |= {"invert": job.inverted, "even_sections": bool(job.section_greys[0])}
    if job.sampler != "one-pass":
        settings |= {"sampler": job.sampler, "steps": job.steps}
    try:
        scores["withheld"] = withheld(open_volume(job.input, **job.input_options), **settings)
    except (InputError, WeightsError) as error:
        scores |= {"withheld": None, "reason": str(error)}
    return scores


def _write(file: str, scores: dict[str, Any]) -> None:
    import json

    from emdiffuse_vol.errors import OutputError

    text = json.dumps(_finite(scores), indent=2, allow_nan=False)
    if file == "-":
        click.echo(text)
        return
    try:
        Path(file).write_text(text + "\n")
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
            f"90 % interval holds {spread['coverage']:.1%} of voxels; spread/skill {spread['spread_skill']:.2f}; "
            f"CRPS {spread['crps']:.2f} greys",
        ]
    return "\n".join([*lines, "", *_detail_lines(scores["detail"])])


# Of the table of details: what it is, and how it is written.
DETAILS = {
    "fsim": ("FSIM", ".3f"),
    "lpips": ("LPIPS", ".3f"),
    "frechet_alexnet": ("Fréchet", ".4f"),
    "resolution_z_nm": ("FSC z nm", ".1f"),
    "resolution_xy_nm": ("FRC xy nm", ".1f"),
    "detail_z": ("detail z", ".2f"),
}


def _detail_lines(found: dict[str, Any]) -> list[str]:
    rows = {name: found[name] for name in ("reconstruction", "linear") if found.get(name)}
    columns = {key: about for key, about in DETAILS.items() if any(key in row for row in rows.values())}
    shape = " x ".join(map(str, found["region"]))
    lines = [f"{found['regions']} regions of {shape}:", f"{'':<16}" + "".join(f"{c:>10}" for c, _ in columns.values())]
    for name, row in rows.items():
        lines.append(f"{name:<16}" + "".join(f"{row[key]:>10{form}}" for key, (_, form) in columns.items()))
    lines.append("detail z: power along z over that of the truth, up to a quarter cycle per voxel; 1 is right")
    if "lpips" in columns:
        lines.append("FID is not scored: Inception's weights are not here; Fréchet is its formula on LPIPS's AlexNet")
    else:
        lines.append(
            "LPIPS and FID are not scored, without weights; benchmarks/lpips_offline.py FOLDER fetches LPIPS's"
        )
    return lines


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value
