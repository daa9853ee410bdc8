"""`emdvol reconstruct`: the main job."""

from __future__ import annotations

from typing import Any

import click

from emdiffuse_vol.cli.options import FLOATS, INTS


@click.command()
@click.argument("input", required=False)
@click.option("--out", help="Output OME-Zarr; run the same command again to continue it.")
@click.option("--mode", help="vEMDiffuse-i or vEMDiffuse-a.  [default: vEMDiffuse-a]")
@click.option("--weights", help="Name of embedded weights, or a file.  [default: vemdiffuse-slab]")
@click.option("--factor", help="Output planes per section: 10, 10.5 or 450/43.  [default: what makes z nearest to XY]")
@click.option("--target-voxel-size", type=float, help="Output z spacing in nm, instead of --factor.")
@click.option("--voxel-size", type=FLOATS, metavar="Z,Y,X", help="Input voxel size in nm, where the file lacks it.")
@click.option("--level", type=int, help="Resolution level of the input.  [default: 0]")
@click.option("--channel", type=int, help="Channel of an input that has several.")
@click.option("--roi", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Region of the input to reconstruct, in its voxels.")
@click.option("--members", type=int, help="Members whose spread is the uncertainty.  [default: 4]")
@click.option("--seed", type=int, help="Seed of the noise.  [default: 0]")
@click.option("--sampler", help="Sampler of diffusion networks: ancestral, ddim, dpm-solver-2m.  [default: ancestral]")
@click.option("--steps", type=int, help="Steps of diffusion networks.  [default: 200]")
@click.option("--tile", type=INTS, metavar="Z,Y,X", help="Output voxels that a network computes at once, halo aside.")
@click.option("--block", type=INTS, metavar="Z,Y,X", help="Output voxels of a task; a multiple of the shard.")
@click.option("--shard", type=INTS, metavar="Z,Y,X", help="Output voxels of a file; a multiple of 64.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.  [default: auto]")
@click.option("--precision", help="auto, float32 or bfloat16.  [default: auto]")
@click.option("--executor", help="local or dask.  [default: local]")
@click.option("--workers", type=int, help="Networks that run at once.  [default: 1]")
@click.option("--overwrite", is_flag=True, default=None, help="Replace an output of other settings.")
@click.option("--config", metavar="FILE", help="JSON file of any of these settings; flags override it.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON (with --dry-run).")
def command(config: str | None, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Reconstruct INPUT (OME-Zarr or TIFF, fine in XY and coarse in Z) as an isotropic volume with its uncertainty."""
    from emdiffuse_vol.config import load_request
    from emdiffuse_vol.reconstruct.run import prepare

    request = load_request(config, flags)
    if dry_run:
        summary = prepare(request).summary()
        _print_plan(summary, as_json)
        return
    _run(request)


def _run(request: Any) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from emdiffuse_vol.reconstruct import run

    with Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ) as bars:
        tasks: dict[str, Any] = {}

        def notify(progress: run.Progress) -> None:
            if progress.stage not in tasks:
                # A resumed run starts where the last one stopped, and is timed from there.
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total, speed="")
            task = tasks[progress.stage]
            elapsed = bars.tasks[task].elapsed or 0
            speed = f"{progress.voxels / elapsed / 1e6:.2f} Mvoxel/s" if elapsed and progress.voxels else ""
            bars.update(task, completed=progress.done, speed=speed)

        output = run.reconstruct(request, notify)
    click.echo(f"{output.path} is complete.")


def _print_plan(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        import json

        click.echo(json.dumps(summary, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    def size(shape: Any) -> str:
        return " x ".join(f"{n:,}" for n in shape)

    def nm(voxel: Any) -> str:
        return " x ".join(f"{v:.6g}" for v in voxel) + " nm"

    given, made = summary["input"], summary["output"]
    rows = [
        ("input", f"{size(given['shape'])} {given['dtype']}, {nm(given['voxel_size'])}"),
        ("output", f"{size(made['shape'])} {made['dtype']}, {nm(made['voxel_size'])}, mean and uncertainty"),
        ("factor", f"{summary['factor']} (sections {summary['gap_pixels']:.4g} pixels apart)"),
        (
            "network",
            f"{summary['weights']}, {summary['members']} members, {summary['evaluations']} evaluations per voxel",
        ),
        ("blocks", f"{summary['blocks']:,} of {size(summary['block'])}, in shards of {size(summary['shard'])}"),
        ("tiles", f"{summary['tiles_per_block']} per block, of {size(summary['tile'])}"),
        ("overlap work", f"{summary['overlap_work']:.0%}"),
        (
            "work",
            f"{summary['flop_per_voxel_network']:.3g} FLOP per voxel in the network, "
            f"{summary['flop_per_voxel']:.3g} with overlap",
        ),
        ("memory", f"{summary['memory_bytes'] / 1e9:.2f} GB in one process"),
        ("disk", f"at most {summary['disk_bytes'] / 1e9:.3g} GB"),
        ("device", f"{summary['device']}, {summary['precision']}"),
    ]
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
