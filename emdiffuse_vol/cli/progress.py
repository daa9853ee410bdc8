"""Progress bars: of a run, one for each stage, of training, and of whatever counts.

They go to standard error, and nowhere with `emdvol --quiet`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from emdiffuse_vol.reconstruct.engine import Progress
    from emdiffuse_vol.training.fit import Run


def console() -> Console:
    from rich.console import Console

    context = click.get_current_context(silent=True)
    return Console(stderr=True, quiet=bool(context and context.find_root().params.get("quiet")))


@contextmanager
def counting(what: str, transient: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Gives what is to be told how many are done, and of how many. transient: the bar is wiped out at the end."""
    from rich.progress import Progress as Bars

    with Bars(console=console(), transient=transient) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def progress_bars() -> Iterator[Callable[[Progress], None]]:
    """Gives what a run is to notify."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console()) as bars:
        tasks: dict[str, Any] = {}

        def notify(progress: Progress) -> None:
            if not tasks and progress.link:
                bars.console.print(f"dashboard: {progress.link}", highlight=False)
            if progress.stage not in tasks:
                # A resumed run starts where the last one stopped, and is timed from there.
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total, speed="")
            task = tasks[progress.stage]
            elapsed = bars.tasks[task].elapsed or 0
            speed = f"{progress.voxels / elapsed / 1e6:.2f} Mvoxel/s" if elapsed and progress.voxels else ""
            speed += f" on {progress.workers} workers" if progress.workers != 1 else ""
            bars.update(task, completed=progress.done, speed=speed)

        yield notify


@contextmanager
def training_bar() -> Iterator[Callable[[Run, dict[str, float]], None]]:
    """Steps done, and the loss averaged over about the last fifty."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console()) as bars:
        smooth: dict[str, float] = {}
        task = bars.add_task("", total=None, loss="", start=False)

        def notify(run: Run, row: dict[str, float]) -> None:
            if not bars.tasks[0].started:
                bars.start_task(task)
            for name in row.keys() - {"step", "rate", "norm", "seconds"}:
                smooth[name] = smooth.get(name, row[name]) * 0.98 + row[name] * 0.02
            loss = ", ".join(f"{name} {value:.3f}" for name, value in sorted(smooth.items()))
            bars.update(task, total=run.steps, completed=run.step, loss=loss)

        yield notify
