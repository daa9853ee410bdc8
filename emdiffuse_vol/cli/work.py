"""`emdvol work`: one of several workers that need no scheduler, such as the tasks of a SLURM array job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class Shard(click.ParamType):  # type: ignore[type-arg]
    """``i/N`` -> (i, N), i from 0."""

    name = "i/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value[0], value[1]
        part, _, parts = str(value).partition("/")
        if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
            self.fail(f"{value!r}: expected i/N with i from 0 to N - 1, such as 3/100", param, ctx)
        return int(part), int(parts)


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--shard", type=Shard(), default=(0, 1), metavar="i/N", help="Which of N parts to do.  [default: all]")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Networks that run at once.")
@click.option("--retry-failed", is_flag=True, help="Take only the blocks that were set aside.")
def command(output: Path, shard: tuple[int, int], workers: int, retry_failed: bool) -> None:
    """Work on OUTPUT, which `emdvol reconstruct` has made (--executor none makes it and does no more).

    Any number of workers may run, at any time, beside each other and beside `emdvol reconstruct`. Ends with status 75
    where its time was up: run it again (scontrol requeue) and it goes on.
    """
    from emdiffuse_vol.cli.numbers import reading
    from emdiffuse_vol.cli.progress import progress_bars
    from emdiffuse_vol.reconstruct.engine import work

    with progress_bars() as notify:
        done = work(output, workers, shard, retry_failed, notify)
    part, parts = shard
    what = f"{done.path}" if done.sealed else f"Part {part}/{parts} of {done.path}"
    click.echo(f"{what} is complete.{reading(done.ended)}")
