"""emdvol sample"""

from __future__ import annotations

import click

from emdiffuse_vol.cli.options import Triple


@click.command()
@click.argument("out", metavar="OUT.zarr")
@click.option("--shape", type=Triple(int), required=True, help="Voxels along z, y and x.")
@click.option("--voxel-size", type=Triple(float), required=True, help="Voxel size in nanometres, such as 40,8,8.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, another tissue.")
@click.option("--overwrite", is_flag=True, help="Replace a Zarr that is already there.")
def command(
    out: str, shape: tuple[int, int, int], voxel_size: tuple[float, float, float], seed: int, overwrite: bool
) -> None:
    """Write a procedural volume that looks like neural tissue, of any size, as OME-Zarr 0.5.

    The same seed and place give the same tissue: a volume of 40,8,8 nm is every fifth plane of one of 8,8,8 nm.
    """
    from emdiffuse_vol.cli.progress import counting
    from emdiffuse_vol.stores.convert import check_place, convert
    from emdiffuse_vol.stores.phantom import PhantomVolume

    check_place(out, overwrite)
    volume = PhantomVolume.of(shape, voxel_size, seed)
    with counting("Sampling") as progress:
        convert(volume, out, overwrite=overwrite, progress=progress)
    click.echo(f"{out}: {volume.spec.shape} uint8, voxels {voxel_size} nm, seed {seed}")
