"""Progress bars of a run, one for each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emdiffuse_vol.reconstruct.engine import Progress


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
    with Bars(*columns) as bars:
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
