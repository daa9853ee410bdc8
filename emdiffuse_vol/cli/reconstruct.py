"""`emdvol reconstruct`: the main job."""

from __future__ import annotations

from typing import Any

import click

from emdiffuse_vol.cli.options import settings_options
from emdiffuse_vol.cli.plan import print_plan


@click.command()
@click.argument("input", required=False)
@click.option("--out", help="Output OME-Zarr; run the same command again to continue it.")
@settings_options
@click.option("--adapt", metavar="TIME", help="First adapt the weights to INPUT for so long: 90s, 10m, 1h.")
@click.option("--executor", help="local, dask, scheduler, slurm, or none.  [default: local]")
@click.option(
    "--workers",
    type=int,
    help="Networks that run at once.  [default: as cores and memory allow, or one per GPU with dask]",
)
@click.option("--scheduler", metavar="ADDRESS", help="Workers of a dask scheduler that runs: tcp://host:8786.")
@click.option("--cluster", metavar="FILE", help="JSON file of SLURM jobs to start as workers.")
@click.option("--patience", type=float, metavar="MINUTES", help="Stop after so long without a worker.  [default: 30]")
@click.option("--overwrite", is_flag=True, default=None, help="Replace an output of other settings.")
@click.option("--retry-failed", is_flag=True, help="Take only the blocks that were set aside.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON (with --dry-run).")
def command(config: str | None, dry_run: bool, as_json: bool, retry_failed: bool, **flags: Any) -> None:
    """Reconstruct INPUT (any volume, fine in XY and coarse in Z) as an isotropic volume with its uncertainty; or, by
    --mode, restore its sections, or both."""
    from emdiffuse_vol.config import load_request
    from emdiffuse_vol.reconstruct.run import prepare

    request = load_request(config, flags)
    if dry_run:
        print_plan(prepare(request).summary(), as_json)
        return
    _advise(request)
    _run(request, retry_failed)


def _advise(request: Any) -> None:
    """One line where greys look like a negative's."""
    from emdiffuse_vol.stores.opening import open_volume
    from emdiffuse_vol.stores.suspicions import suspect_contrast

    volume = open_volume(request.input, voxel_size=request.voxel_size, level=request.level, channel=request.channel)
    for problem in () if request.invert else suspect_contrast(volume):
        click.echo(f"Note: {problem}", err=True)


def _run(request: Any, retry_failed: bool) -> None:
    from emdiffuse_vol.cli.numbers import reading
    from emdiffuse_vol.cli.progress import progress_bars, training_bar
    from emdiffuse_vol.reconstruct.reliability import reliability
    from emdiffuse_vol.reconstruct.run import NONE, executor_of, reconstruct

    if request.adapt is not None:
        from emdiffuse_vol.training.adapt import adapted

        with training_bar() as notify:
            request = adapted(request, notify)
    with progress_bars() as notify:
        output = reconstruct(request, notify, retry_failed=retry_failed)
    if executor_of(request) == NONE and not output.sealed:
        click.echo(f"{output.path} is ready for `emdvol work {output.path} --shard $SLURM_ARRAY_TASK_ID/N`.")
    else:
        click.echo(f"{output.path} is complete.{reading(output.ended)}")
        click.echo(str(reliability(output)))
