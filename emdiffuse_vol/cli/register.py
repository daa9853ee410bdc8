"""`emdvol register`: a moving image, series or stack onto a fixed one, or a stack onto itself."""

from __future__ import annotations

from typing import Any

import click

from emdiffuse_vol.cli.options import voxel_size_option

SHOWN = 768  # pixels along a picture's edge


@click.command()
@click.argument("moving")
@click.argument("fixed", required=False)
@click.option("--out", required=True, metavar="PAIR.zarr", help="The moving volume in the frame of the fixed one.")
@click.option("--stack", is_flag=True, help="Align the sections of one stack, each on the one before.")
@click.option("--transform", help="translation, rigid, affine or homography.  [default: affine; of a stack, rigid]")
@click.option("--by", type=click.Choice(["features", "correlation"]), help="How it is found.  [default: features]")
@click.option("--flow", type=click.Choice(["ilk", "tvl1", "raft", "none"]), help="What bends it.  [default: ilk]")
@click.option("--flow-weights", metavar="FILE", help="Weights of raft, instead of those torchvision downloads.")
@click.option(
    "--factor", type=click.IntRange(1, 64), help="Pixels of FIXED in one of MOVING.  [default: by their sizes]"
)
@click.option("--window", type=float, help="Sections whose common drift stays in a stack.  [default: 50]")
@click.option("--skip-failed", is_flag=True, help="Leave sections empty that cannot be registered.")
@click.option("--picture", metavar="FILE.png", help="Draw the section in the middle, before and after.")
@voxel_size_option
@click.option("--overwrite", is_flag=True, help="Replace a Zarr that is already there.")
def command(
    moving: str,
    fixed: str | None,
    out: str,
    stack: bool,
    window: float | None,
    picture: str | None,
    voxel_size: tuple[float, float, float] | None,
    **options: Any,
) -> None:
    """Bring MOVING into the frame of FIXED: images, series or stacks, section by section. With --stack, straighten the
    drift of MOVING alone. What cannot be registered is refused, with the number that failed.

    `emdvol train --pair PAIR.zarr FIXED` learns from the result.
    """
    from emdiffuse_vol.cli.progress import counting
    from emdiffuse_vol.errors import ConfigError

    if stack == (fixed is not None):
        raise ConfigError("give MOVING and FIXED, or one stack with --stack")
    if picture:
        from emdiffuse_vol.viewing.charts import check_matplotlib

        check_matplotlib()
    ways = {"by": options.pop("by"), "flow": options.pop("flow"), "weights": options.pop("flow_weights")}
    ways = {name: value for name, value in ways.items() if value is not None}
    factor, transform = options.pop("factor"), options.pop("transform")
    with counting("Registering sections") as progress:
        if fixed is None:
            from emdiffuse_vol.alignment.stacks import WINDOW, align_stack
            from emdiffuse_vol.stores.opening import open_volume

            if ways or factor or picture:
                raise ConfigError("--by, --flow, --flow-weights, --factor and --picture are of pairs; leave them out")
            source = open_volume(moving, voxel_size=voxel_size)
            window = WINDOW if window is None else window
            records = align_stack(source, out, transform or "rigid", window, progress=progress, **options)
        else:
            from emdiffuse_vol.alignment.pairs import open_pair_to_register, register_pair
            from emdiffuse_vol.registration.pairs import Settings

            if window is not None:
                raise ConfigError("--window is of --stack; leave it out")
            source, target, factor = open_pair_to_register(moving, fixed, voxel_size, factor)
            settings = Settings(transform or "affine", **ways)
            records = register_pair(source, target, factor, out, settings, progress=progress, **options)
            if picture:
                draw(out, source, target, factor, records, picture)
    report(records, out)


def report(records: list[dict[str, Any]], out: str) -> None:
    from statistics import median

    good = [record["measures"] for record in records if not record["failures"]]
    names = sorted({name for measures in good for name in measures})
    said = ", ".join(f"{name} {median(m[name] for m in good if name in m):.3g}" for name in names)
    failed = [str(record["section"]) for record in records if record["failures"]]
    click.echo(f"{out}: {len(good)} section{'s' if len(good) != 1 else ''} registered; {said}")
    if failed:
        click.echo(f"left empty: section{'s' if len(failed) != 1 else ''} {', '.join(failed)}")


def draw(out: str, source: Any, target: Any, factor: int, records: list[dict[str, Any]], picture: str) -> None:
    """The middle of the middle one of the sections that did not fail."""
    from emdiffuse_vol.alignment.pairs import read_registered
    from emdiffuse_vol.viewing.registration import draw_registration

    good = [record["section"] for record in records if not record["failures"]]
    shown = read_registered(out, source, target, factor, good[len(good) // 2], SHOWN)
    draw_registration(picture, *shown, source.spec.voxel_size[2])
    click.echo(f"wrote {picture}")
