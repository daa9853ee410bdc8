"""`emdvol models`: weights that have a name, what is known of them, and how others get one."""

from __future__ import annotations

from typing import Any

import click

from emdiffuse_vol.cli.numbers import amount, digits
from emdiffuse_vol.cli.options import Group


@click.group(cls=Group)
def command() -> None:
    """Weights that come with the package or were imported: list, show, import and check them.

    Wherever --weights is taken, give such a name, a .safetensors or published .pth file, or a URL with the checksum of
    its file, https://host/file.pth#sha256=HEX.
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list, for programs.")
def list_command(as_json: bool) -> None:
    """List the weights that have a name."""
    import json

    from emdiffuse_vol.models.registry import catalogue

    found = catalogue()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    head = ("name", "modes", "sections apart", "parameters", "size", "calibrated", "origin")
    click.echo(_columns([head, *(_row(weights) for weights in found)]))


def _row(weights: dict[str, Any]) -> tuple[str, ...]:
    if "error" in weights:
        return weights["name"], "cannot be read: emdvol models show says why", "", "", "", "", weights["origin"]
    return (
        weights["name"],
        ", ".join(weights["modes"]),
        _gaps(weights),
        f"{weights['parameters']:,}",
        amount(weights["bytes"]),
        "yes" if weights["calibrated"] else "no",
        weights["origin"],
    )


def _columns(rows: list[tuple[str, ...]]) -> str:
    """Aligned, however wide the terminal: these tables are also read by grep and awk."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _gaps(weights: dict[str, Any]) -> str:
    if not weights["gaps"]:
        return "any (not known)"
    least, greatest = weights["gaps"]
    only = f", factor {weights['factor']}" if weights["factor"] else ""
    return f"{least:g} to {greatest:g} px{only}"


@command.command()
@click.argument("weights", metavar="NAME|PATH|URL")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
def show(weights: str, as_json: bool) -> None:
    """Say all that is known of some weights; they are loaded and checked for it. Ends with their model card."""
    import json

    from emdiffuse_vol.models.checkpoints import describe, load_weights

    facts = describe(load_weights(weights))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(_columns(_facts(facts)))
    if facts["calibration"]:
        click.echo("\n" + _calibration(facts["calibration"]))
    if facts["card"]:
        click.echo("\n" + facts["card"].rstrip())


def _facts(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    greys = {"dtype": "the full range of the input's type", "percentiles": "percentiles of the volume"}
    training = facts["training"] or {}
    rows = [
        ("name", facts["name"]),
        ("file", f"{facts['path']}, {amount(facts['bytes'])}"),
        ("sha256", facts["sha256"]),
        ("origin", facts["origin"] + (f", {facts['source']['url']}" if facts["source"].get("url") else "")),
        ("original sha256", facts["source"].get("sha256", "")),
        ("architecture", facts["architecture"] + "".join(f", {k} {v}" for k, v in facts["config"].items())),
        ("parameters", f"{facts['parameters']:,}"),
        ("modes", ", ".join(facts["modes"])),
        ("sections apart", _gaps(facts)),
        ("greys", greys.get(facts["greys"], facts["greys"] or "percentiles of the volume")),
        ("trained on", str(training.get("data", "not known"))),
        ("settings", ", ".join(f"{k} {v}" for k, v in training.get("settings", {}).items())),
        ("licence", str(facts["licence"] or "not known")),
        ("calibrated", "as below" if facts["calibration"] else "no: the uncertainty is the members' plain spread"),
    ]
    return [row for row in rows if row[1]]


def _calibration(table: dict[str, Any]) -> str:
    scale, coverage = table.get("scale", {}), table.get("coverage", {})
    head = ("gap (px)", "scale of the spread", "coverage of the 90 % interval")
    rows = [
        (gap, digits(scale[gap]), f"{coverage[gap]:.1%}" if gap in coverage else "not measured")
        for gap in sorted(scale, key=float)
    ]
    members = f"\nfor {table['members']} members" if "members" in table else ""
    return _columns([head, *rows]) + members


@command.command("import")
@click.argument("source", metavar="SOURCE")
@click.option("--as", "name", required=True, metavar="NAME", help="What --weights will call them.")
@click.option("--sha256", metavar="HEX", help="Checksum that the file must have.")
@click.option("--ema", is_flag=True, help="Take PREFIX_Network_ema.pth instead of PREFIX_Network.pth.")
@click.option("--factor", type=click.IntRange(min=2), help="The one factor that published vEMDiffuse weights serve.")
@click.option("--mode", help="The one mode they are to serve.  [default: all that their architecture can]")
@click.option("--overwrite", is_flag=True, help="Replace weights of this name.")
def import_command(
    source: str, name: str, sha256: str | None, ema: bool, factor: int | None, mode: str | None, overwrite: bool
) -> None:
    """Give weights a name: SOURCE is a .safetensors, a published .pth or its PREFIX, or a URL of any of these.

    They are loaded strictly, nothing but tensors is unpickled, and written as .safetensors into the folder that
    EMDVOL_MODELS names, or the user's own (~/.local/share/emdvol/models).
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from emdiffuse_vol.cli.progress import console
    from emdiffuse_vol.models.importing import import_weights

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console(), transient=True) as progress:
        task = progress.add_task("Fetching", total=None)
        made = import_weights(
            source,
            name,
            sha256=sha256,
            ema=ema,
            factor=factor,
            mode=mode,
            overwrite=overwrite,
            notify=lambda done, total: progress.update(task, completed=done, total=total),
        )
    origin = made.metadata["origin"]
    click.echo(f"{origin['file']}: sha256 {origin['sha256']}{'' if sha256 or '#' in source else ', not verified'}")
    click.echo(f"{name}: {made.architecture} for {', '.join(made.metadata['modes'])}, in {made.path}")


@command.command()
@click.argument("weights", metavar="NAME|PATH|URL")
@click.option("--input", metavar="VOLUME", help="Take sections from the middle of it.  [default: procedural tissue]")
@click.option("--factor", type=click.IntRange(min=2), help="Planes per section.  [default: what the weights say]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
def check(weights: str, input: str | None, factor: int | None, as_json: bool) -> None:
    """Turn a stack over and see whether the planes come back in reverse order, as they should.

    Published vEMDiffuse weights that do not mirror were trained with the same section on both sides, or at another
    spacing. Ends with status 1 where the weights fail. Takes a minute on a CPU for the published network.
    """
    import json
    from dataclasses import asdict

    from emdiffuse_vol.errors import WeightsError
    from emdiffuse_vol.models.checkpoints import load_weights

    loaded = load_weights(weights)
    found = _symmetry(loaded, input, factor)
    if as_json:
        click.echo(json.dumps({"name": loaded.name, "input": input or "procedural", **asdict(found)}, indent=2))
    else:
        head = ("plane", "position", "expected", "mismatch")
        rows = [
            (str(k), f"{position:.2f}", f"{k / found.factor:.2f}", f"{mismatch:.1%}")
            for k, (position, mismatch) in enumerate(zip(found.position, found.mismatch, strict=True), start=1)
        ]
        means = ", ".join(f"{mean:.1%} for factor {of}" for of, mean in found.factors.items())
        click.echo(_columns([head, *rows]) + f"\nmismatch on average: {means}")
    if found.complaint:
        raise WeightsError(f"weights {loaded.name} fail the check: {found.complaint}")
    if not as_json:
        click.echo(f"{loaded.name}: planes mirror when the sections are exchanged, as they should.")


def _symmetry(weights: Any, source: str | None, factor: int | None) -> Any:
    """Sections of the middle of a volume, normalised as the weights want them, and the check of them."""
    from fractions import Fraction

    import torch

    from emdiffuse_vol.geometry.boxes import Box
    from emdiffuse_vol.models.symmetry import SECTIONS, SIZE, check_symmetry, default_factor
    from emdiffuse_vol.reconstruct.greys import dtype_greys, measure_greys
    from emdiffuse_vol.stores.opening import open_volume
    from emdiffuse_vol.stores.phantom import PhantomVolume
    from emdiffuse_vol.stores.volume import read_mirrored

    if source is None:
        factor = factor or default_factor(weights)
        volume: Any = PhantomVolume.of((SECTIONS, SIZE, SIZE), (8.0 * factor, 8.0, 8.0))
    else:
        volume = open_volume(source)
    spec = volume.spec
    gap = spec.voxel_size[0] / ((spec.voxel_size[1] + spec.voxel_size[2]) / 2)
    factor = factor or weights.metadata.get("factor") or max(2, round(gap))
    weights.check(weights.metadata["modes"][0], gap, Fraction(factor))
    low = [(n - size) // 2 for n, size in zip(spec.shape, (SECTIONS, SIZE, SIZE), strict=True)]
    box = Box((low[0], low[1], low[2]), (low[0] + SECTIONS, low[1] + SIZE, low[2] + SIZE))
    sections = read_mirrored(volume, box)
    if weights.metadata.get("greys") == "dtype":
        greys = dtype_greys(spec.dtype)
    elif source is None:  # it is read already, and painting it again for each sample would take long
        greys = measure_greys(spec.shape, lambda part: sections[part.slices(box.start)])[0]
    else:
        greys = measure_greys(spec.shape, volume.read)[0]
    return check_symmetry(weights, torch.from_numpy(greys.normalise(sections)), factor, gap)
