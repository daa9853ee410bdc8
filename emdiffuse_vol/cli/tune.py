"""`emdvol tune`: what is fastest on this machine."""

from __future__ import annotations

from typing import Any

import click


@click.command()
@click.option("--weights", default="vemdiffuse-a-fast", show_default=True, help="A name, a file, or URL#sha256=HEX.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def command(weights: str, device: str) -> None:
    """Find the fastest precision, tile and number of networks at once on this machine, and keep the choice.

    Later runs with these weights use it wherever they are not told otherwise; outputs that were begun go on as they
    were.
    """
    from emdiffuse_vol.models.checkpoints import load_weights
    from emdiffuse_vol.reconstruct.tuning import tune

    click.echo(f"{'precision':>10} {'tile':>14} {'at once':>8} {'Mvoxel/s':>9}")

    def tell(row: Any) -> None:
        setting = row.setting
        tile = "x".join(map(str, setting.tile))
        click.echo(f"{setting.precision:>10} {tile:>14} {setting.workers:>8} {row.voxels_per_second / 1e6:>9.3f}")

    best = tune(load_weights(weights), device, tell)
    tile = ",".join(map(str, best.tile))
    click.echo(f"kept: --precision {best.precision} --tile {tile} --workers {best.workers}")
