"""emdvol export"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from emdiffuse_vol.cli.options import level_option, voxel_size_option

FORMATS = ("tiff", "tiff-series", "hdf5", "n5", "precomputed", "ome-zarr", "ome-zarr-0.4")


@click.command()
@click.argument("source", metavar="OUTPUT")
@click.argument("target", metavar="TARGET")
@click.option("--format", type=click.Choice(FORMATS), help="Of the target, where its suffix does not tell.")
@click.option(
    "--channel", metavar="NAME|N", help="mean, uncertainty, or a number.  [default: mean of what emdvol has made]"
)
@click.option("--roi", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Region to write, in voxels of the level.")
@level_option
@voxel_size_option
@click.option("--jpeg", is_flag=True, help="Compress precomputed uint8 with loss.")
@click.option("--overwrite", is_flag=True, help="Replace a volume of this format that is already there.")
def command(
    source: str,
    target: str,
    format: str | None,
    channel: str | None,
    roi: str | None,
    level: int,
    voxel_size: tuple[float, float, float] | None,
    jpeg: bool,
    overwrite: bool,
) -> None:
    """Write a reconstruction, or any volume, as TIFF (.tif), HDF5 (.h5), N5 (.n5), precomputed or OME-Zarr (.zarr).

    TARGET may be file.h5:/path. Folders that were interrupted are gone on with by the same command.
    """
    from emdiffuse_vol.errors import ConfigError
    from emdiffuse_vol.stores.export import format_of
    from emdiffuse_vol.stores.opening import open_volume
    from emdiffuse_vol.stores.region import region_of

    format = format or format_of(target)
    if format is None:
        raise ConfigError(f"{target} does not tell a format by its suffix; give --format {'|'.join(FORMATS)}")
    uncertainty = _uncertainty(source)
    if channel is None and uncertainty:
        channel = "mean"
    chosen = int(channel) if channel is not None and channel.isdecimal() else channel
    volume = open_volume(source, voxel_size=voxel_size, level=level, channel=chosen)
    box = None
    if roi is not None:
        from emdiffuse_vol.reconstruct.run import parse_roi

        box = parse_roi(roi)
    write(region_of(volume, box), target, format, jpeg=jpeg, overwrite=overwrite)
    if uncertainty and chosen in ("uncertainty", uncertainty.get("channel")):
        click.echo(f"uncertainty in greys = stored value x {uncertainty['step']:g}")


def _uncertainty(source: str) -> dict[str, Any]:
    """How a reconstruction of ours stores it; empty for any other volume."""
    from emdiffuse_vol.stores.metadata import read_attributes

    made = read_attributes(Path(source)).get("emdvol")
    found = made.get("uncertainty") if isinstance(made, dict) else None
    return found if isinstance(found, dict) and "step" in found else {}


def write(volume: Any, target: str, format: str, *, jpeg: bool = False, overwrite: bool) -> None:
    """Export with a progress bar, and say what there is now."""
    from emdiffuse_vol import __version__
    from emdiffuse_vol.cli.progress import counting
    from emdiffuse_vol.stores.export import export

    with counting(f"Writing {volume.spec.shape} {volume.spec.dtype} as {format}") as progress:
        export(
            volume,
            target,
            format,
            jpeg=jpeg,
            overwrite=overwrite,
            provenance={"software": {"emdiffuse_vol": __version__}},
            progress=progress,
        )
    click.echo(f"{target}: {volume.spec.shape} {volume.spec.dtype}, voxels {volume.spec.voxel_size} nm")
