"""emdvol info"""

from __future__ import annotations

from typing import Any

import click

from emdiffuse_vol.cli.options import channel_option, level_option, voxel_size_option


@click.command()
@click.argument("volume", metavar="VOLUME")
@voxel_size_option
@level_option
@channel_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
def command(
    volume: str, voxel_size: tuple[float, float, float] | None, level: int, channel: int | None, as_json: bool
) -> None:
    """Print shape, voxel size, greys, factor and problems of a volume, from a sparse sample of it."""
    import json

    from emdiffuse_vol.stores.opening import open_volume

    facts = describe(open_volume(volume, voxel_size=voxel_size, level=level, channel=channel))
    click.echo(json.dumps(facts, indent=2) if as_json else table(facts))


def describe(volume: Any) -> dict[str, Any]:
    from emdiffuse_vol.stores.survey import survey

    spec, seen = volume.spec, survey(volume)
    return {
        "volume": volume.url,
        "format": spec.identity["format"],
        "axes": "zyx",
        "stored_axes": list(getattr(volume, "axes", "zyx")),
        "shape": spec.shape,
        "dtype": spec.dtype,
        "chunk": spec.chunk,
        "voxel_size_nm": spec.voxel_size,
        "origin_nm": spec.origin,
        "factor_to_isotropy": round(seen.factor, 4),
        "percentiles": dict(zip(("0.5", "50", "99.5"), seen.percentiles, strict=True)),
        "sections_sampled": seen.sections,
        "constant_sections": seen.constant,
        "noise": None if seen.noise is None else dict(zip(("least", "median", "greatest"), seen.noise, strict=True)),
        "problems": seen.problems,
    }


def table(facts: dict[str, Any]) -> str:
    def triple(values: tuple[float, ...] | None) -> str:
        return " x ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values) if values else "none"

    greys = ", ".join(f"{name} %: {value:g}" for name, value in facts["percentiles"].items())
    noise = "not known"
    if seen := facts["noise"]:
        noise = f"{seen['median']:.3g} greys, {seen['least']:.3g} to {seen['greatest']:.3g} in single sections"
    rows = {
        "volume": facts["volume"],
        "format": f"{facts['format']}, {facts['dtype']}",
        "axes": f"{' '.join(facts['stored_axes'])} as stored, read as z y x",
        "shape (z y x)": f"{triple(facts['shape'])}, read in chunks of {triple(facts['chunk'])}",
        "voxel size": f"{triple(facts['voxel_size_nm'])} nm, first voxel at {triple(facts['origin_nm'])} nm",
        "factor": f"{facts['factor_to_isotropy']:g} to isotropy",
        "greys": f"{greys} (of {facts['sections_sampled']} sections, sampled)",
        "noise": noise,
        "problems": "; ".join(facts["problems"]) or "none seen",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
