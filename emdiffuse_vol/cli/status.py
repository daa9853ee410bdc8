"""`emdvol status`: how far a run is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from emdiffuse_vol.reconstruct.status import Status

SHADES = " ░▒▓█"


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--watch", is_flag=True, help="Show it again every two seconds, until the run is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(output: Path, watch: bool, as_json: bool) -> None:
    """Show how far the run that makes OUTPUT is: while it runs, or after it has stopped."""
    import json
    import time

    from emdiffuse_vol.reconstruct.status import read_status

    found = read_status(output)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not watch:
        console.print(picture(found))
        return
    with Live(picture(found), console=console, auto_refresh=False) as live:
        while not found.sealed:
            time.sleep(2)
            found = read_status(output)
            live.update(picture(found), refresh=True)


def picture(found: Status) -> Any:
    """What people see: a table of facts, and the blocks seen along z."""
    from rich.console import Group
    from rich.table import Table

    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold")
    facts.add_column()
    for row in rows(found):
        facts.add_row(*row)
    return Group(facts, *block_map(found))


def rows(found: Status) -> list[tuple[str, str]]:
    lines = [("output", f"{found.path}, {'complete' if found.sealed else 'not complete'}")]
    for stage in found.stages:
        counts = ", ".join(f"{n:,} {name}" for name, n in stage.counts.items() if n and name not in ("done", "pending"))
        share = f"{stage.finished:,} of {stage.total:,} ({stage.finished / stage.total:.1%})"
        lines.append((stage.name, f"{share}{', of them ' + counts if counts else ''}"))
    if found.block_seconds:
        lines.append(("block", f"{found.block_seconds:.3g} s on average"))
    if found.tries:
        lines.append(("failed tries", f"{found.tries:,}"))
    if found.failed:
        some = ", ".join(map(str, found.failed[:10])) + (", ..." if len(found.failed) > 10 else "")
        lines.append(("set aside", f"{some} (events.jsonl says why; --retry-failed takes them)"))
    for driver in found.drivers:
        lines.append(("driver", _driver(driver)))
    if not found.sealed and not any(driver.live for driver in found.drivers):
        lines.append(("driver", "none runs; the command that began the run continues it"))
    if found.rate:
        left = found.seconds_left or 0
        lines.append(("speed", f"{found.rate / 1e6:.3g} Mvoxel/s, about {_duration(left)} left for the blocks"))
    return lines


def _driver(driver: Any) -> str:
    import time

    doing = f"{driver.stage}, {driver.done:,} done, {driver.in_flight} in flight, {driver.retried} tried again"
    where = f"{driver.host} process {driver.pid}, {driver.executor}, part {driver.share}, {driver.workers} workers"
    silent = "" if driver.live else f"; silent for {_duration(time.time() - driver.updated)}: it seems to be gone"
    return f"{where}: {doing}{silent}"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def block_map(found: Status) -> list[Any]:
    """Rows of the map: darker to fuller the more is done, ! where a block failed, . where all is outside tissue."""
    import numpy as np
    from rich.text import Text

    lines = [Text("blocks, seen along z:", style="bold")]
    for row in found.block_map:
        line = Text()
        for cell in row:
            if np.isnan(cell):
                line.append("..", style="dim")
            elif cell < 0:
                line.append("!!", style="bold red")
            else:
                line.append(SHADES[int(cell * (len(SHADES) - 1))] * 2, style="green on grey23")
        lines.append(line)
    return lines
