"""`emdvol restore`: images and stacks, restored into files like their own."""

from __future__ import annotations

from typing import Any

import click

from emdiffuse_vol.cli.options import channel_option, level_option, voxel_size_option


@click.command()
@click.argument("input")
@click.option("--out", required=True, help="File to write: .tif, .png (one section), .h5 or .n5.")
@click.option("--mode", default="EMDiffuse-n", show_default=True, help="EMDiffuse-n or -r, FastScan-s or -ss.")
@click.option("--weights", help="A name of `emdvol models list`, a file, or a URL#sha256=HEX.")
@click.option("--members", type=int, default=4, show_default=True, help="Members whose spread is the uncertainty.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@click.option(
    "--sampler", help="Of diffusion networks: ancestral (or legacy), ddim, dpm-solver-2m.  [default: ancestral]"
)
@click.option("--steps", type=int, help="Steps of diffusion networks.  [default: 200]")
@click.option("--roi", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Region of the input to restore, in its voxels.")
@level_option
@channel_option
@voxel_size_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
def command(**flags: Any) -> None:
    """Restore INPUT, an image (TIFF, PNG) or any stack, section by section: denoised, or with more pixels.

    Beside the file of --out one with its uncertainty is written, NAME_uncertainty. For volumes of many blocks there is
    `emdvol reconstruct --mode EMDiffuse-n`, which does the same into an OME-Zarr.
    """
    from emdiffuse_vol.cli.progress import progress_bars
    from emdiffuse_vol.reconstruct.job import Request
    from emdiffuse_vol.reconstruct.restore import restore

    given = {name: value for name, value in flags.items() if value is not None}
    with progress_bars() as notify:
        restored = restore(Request(**given), notify)
    click.echo(
        f"{restored.mean} and {restored.uncertainty} (greys = stored value x {restored.step:g}); {restored.reliability}"
    )
