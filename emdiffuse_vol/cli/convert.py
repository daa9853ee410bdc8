"""emdvol convert"""

from __future__ import annotations

import click

from emdiffuse_vol.cli.export import write
from emdiffuse_vol.cli.options import INTS, channel_option, level_option, voxel_size_option


@click.command()
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT")
@voxel_size_option
@level_option
@channel_option
@click.option(
    "--chunk", type=INTS, default=(64, 64, 64), help="Chunk of an OME-Zarr in voxels; 64,64,64 when not given."
)
@click.option("--overwrite", is_flag=True, help="Replace a volume that is already there.")
def command(
    source: str,
    out: str,
    voxel_size: tuple[float, float, float] | None,
    level: int,
    channel: int | None,
    chunk: tuple[int, int, int],
    overwrite: bool,
) -> None:
    """Turn any volume into a sharded OME-Zarr 0.5, or into what OUT's suffix says: .tif, .h5, .n5, .precomputed.

    Reads OME-Zarr, Zarr, N5, precomputed, HDF5 (file.h5:/path), MRC, TIFF and folders of TIFF sections. A conversion in
    a folder that was interrupted is gone on with by the same command.
    """
    from emdiffuse_vol import __version__
    from emdiffuse_vol.cli.progress import counting
    from emdiffuse_vol.stores.convert import check_place, convert
    from emdiffuse_vol.stores.export import format_of
    from emdiffuse_vol.stores.opening import open_volume

    if (format := format_of(out)) not in (None, "ome-zarr"):
        volume = open_volume(source, voxel_size=voxel_size, level=level, channel=channel)
        return write(volume, out, format, overwrite=overwrite)
    check_place(out, overwrite)
    volume = open_volume(source, voxel_size=voxel_size, level=level, channel=channel)
    with counting(f"Converting {volume.spec.shape} {volume.spec.dtype}") as progress:
        convert(
            volume,
            out,
            chunk=chunk,
            overwrite=overwrite,
            provenance={"software": {"emdiffuse_vol": __version__}},
            progress=progress,
        )
    click.echo(f"{out}: {volume.spec.shape} {volume.spec.dtype}, voxels {volume.spec.voxel_size} nm")
