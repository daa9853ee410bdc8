"""`emdvol verify`: compares an output with the checksums in its ledger."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--repair", is_flag=True, help="Mark what does not match as not done, so that it is made again.")
def command(output: Path, repair: bool) -> None:
    """Check that every block of OUTPUT that is recorded as done is on disk as it was written."""
    from rich.progress import Progress

    from emdiffuse_vol.errors import OutputError
    from emdiffuse_vol.reconstruct.verify import spread_of, verify

    with Progress() as bar:
        task = bar.add_task("verify", total=None)
        total, wrong = verify(output, repair, lambda done, of: bar.update(task, completed=done, total=of))
    if not wrong:
        click.echo(f"All {total:,} blocks of {output} are as they were written.")
        return
    said = (
        f"{len(wrong)} of {total} blocks are not as they were written ({'; '.join(spread_of(wrong))}; {wrong[0].why})"
    )
    if not repair:
        raise OutputError(f"{said}; run emdvol verify --repair, then the command that made the output")
    click.echo(f"{said}. They are marked as not done: run the command that made the output again.")
