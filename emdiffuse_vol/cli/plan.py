"""`emdvol plan`, and the table of a plan that `emdvol reconstruct --dry-run` prints too."""

from __future__ import annotations

from typing import Any

import click

from emdiffuse_vol.cli.numbers import amount, digits, times
from emdiffuse_vol.cli.options import INTS, settings_options


@click.command()
@click.argument("input", required=False)
@click.option("--shape", type=INTS, metavar="Z,Y,X", help="Voxels of an input that is not there; with --voxel-size.")
@settings_options
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="Devices that work at once.")
@click.option("--price", type=click.FloatRange(min=0), help="Of a device for an hour, in any currency.")
@click.option("--calibrate/--no-calibrate", default=True, help="Time a few tiles on the device.  [default: calibrate]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
def command(
    input: str | None,
    shape: tuple[int, int, int] | None,
    config: str | None,
    devices: int,
    price: float | None,
    calibrate: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Say what reconstructing INPUT would cost: blocks, bytes, memory, and hours as timed on a few tiles here.

    Nothing is written. With --shape there need be no input: --shape 25000,125000,125000 --voxel-size 40,8,8 asks for a
    cubic millimetre.
    """
    from emdiffuse_vol.reconstruct.estimate import calibrate as measure
    from emdiffuse_vol.reconstruct.estimate import estimate

    prepared = _prepare(input, shape, config, flags)
    summary = prepared.summary()
    if calibrate:
        summary["estimate"] = estimate(prepared, measure(prepared), devices, price)
    print_plan(summary, as_json)


def _prepare(input: str | None, shape: tuple[int, int, int] | None, config: str | None, flags: dict[str, Any]) -> Any:
    from dataclasses import replace

    from emdiffuse_vol.config import load_request, read_json
    from emdiffuse_vol.errors import ConfigError
    from emdiffuse_vol.reconstruct.estimate import ImaginedVolume
    from emdiffuse_vol.reconstruct.run import prepare_volume
    from emdiffuse_vol.reconstruct.source import DETECT
    from emdiffuse_vol.stores.opening import open_volume

    if input and shape:
        raise ConfigError(f"INPUT {input} has a shape of its own; leave out INPUT or --shape")
    if not (input or shape or (config and "input" in read_json(config))):
        raise ConfigError("there is nothing to plan; give INPUT, or --shape Z,Y,X for an input that is not there")
    request = load_request(config, flags | {"input": input or (shape and "imagined"), "out": ""})
    if request.executor != "dask":
        # Workers elsewhere may have devices that are not here; what is measured is what is here.
        request = replace(request, executor=None, scheduler=None, cluster=None)
    if not shape:
        volume = open_volume(request.input, voxel_size=request.voxel_size, level=request.level, channel=request.channel)
        return prepare_volume(request, volume)
    if not request.voxel_size:
        raise ConfigError("--shape counts voxels and does not say how large they are; give --voxel-size Z,Y,X in nm")
    imagined = ImaginedVolume.of(shape, request.voxel_size)
    damaged = None if request.damaged == DETECT else request.damaged  # there is nothing to detect it in
    return prepare_volume(replace(request, input=imagined.url, damaged=damaged), imagined)


def print_plan(summary: dict[str, Any], as_json: bool) -> None:
    """summary: of ``Prepared``, with or without an ``estimate``."""
    if as_json:
        import json

        click.echo(json.dumps(summary, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for row in [*_rows(summary), *(_estimate_rows(summary["estimate"]) if "estimate" in summary else ())]:
        table.add_row(*row)
    Console(width=120).print(table)


def _rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    given, made = plan["input"], plan["output"]
    chunks = plan["read_amplification_chunks"]
    return [
        ("input", f"{times(given['shape'])} {given['dtype']}, {_nm(given['voxel_size'])}"),
        ("output", f"{times(made['shape'])} {made['dtype']}, {_nm(made['voxel_size'])}, mean and uncertainty"),
        ("factor", f"{plan['factor']} (sections {plan['gap_pixels']:.4g} pixels apart)"),
        ("network", f"{plan['weights']}, {plan['members']} members, {plan['evaluations']} evaluations per voxel"),
        ("blocks", f"{plan['blocks']:,} of {times(plan['block'])}, in shards of {times(plan['shard'])}"),
        ("tiles", f"{plan['tiles']:,}, {plan['tiles_per_block']} per block, of {times(plan['tile'])}"),
        ("overlap work", f"{plan['overlap_work']:.0%}"),
        (
            "work",
            f"{plan['flop_per_voxel_network']:.3g} FLOP per voxel in the network, "
            f"{plan['flop_per_voxel']:.3g} with overlap, {plan['flop']:.3g} FLOP in all",
        ),
        (
            "reading",
            f"{amount(plan['read_bytes'])}, {plan['read_amplification']:.2f} times the input"
            + (f"; {chunks:.2f} times, where nothing keeps its chunks of {times(given['chunk'])}" if chunks else ""),
        ),
        ("memory", f"{amount(plan['process_bytes'])} in a process, {amount(plan['memory_bytes'])} in all here"),
        ("disk", f"at most {amount(plan['disk_bytes'])} in {plan['files']:,} files"),
        ("ledger", amount(plan["ledger_bytes"])),
        ("device", f"{plan['device']}, {plan['precision']}"),
    ]


def _estimate_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    timed, devices = found["calibration"], found["devices"]
    rows = [
        (
            "measured on",
            f"{timed['hardware']}: {timed['network']:.3g} s a tile in the network, {timed['host']:.3g} s around it",
        ),
        (
            "speed",
            f"{found['voxels_per_second'] / 1e6:.3g} Mvoxel/s per device; "
            f"{amount(found['bytes_per_second'])}/s read and written meanwhile",
        ),
        (
            "time",
            f"{digits(found['device_hours'])} device-hours, {digits(found['days'])} days "
            f"on {devices:,} device{'s' if devices > 1 else ''}",
        ),
    ]
    if found["cost"] is not None:
        rows.append(("cost", f"{digits(found['cost'])}, at {found['price_per_device_hour']:g} for a device-hour"))
    return rows


def _nm(voxel: Any) -> str:
    return " x ".join(f"{v:.6g}" for v in voxel) + " nm"
