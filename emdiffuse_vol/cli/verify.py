"""`emdvol verify`: compares an output with the checksums in its ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--repair", is_flag=True, help="Mark what does not match as not done, so that it is made again.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
def command(output: Path, repair: bool, as_json: bool) -> None:
    """Check that every block of OUTPUT that is recorded as done is on disk as it was written."""
    from emdiffuse_vol.cli.progress import counting
    from emdiffuse_vol.errors import OutputError
    from emdiffuse_vol.reconstruct.verify import spread_of, verify

    with counting("verify") as progress:
        total, wrong = verify(output, repair, progress)
    if as_json:
        _print(output, total, [vars(mismatch) for mismatch in wrong], repair)
        return
    if not wrong:
        click.echo(f"All {total:,} blocks of {output} are as they were written.")
        return
    said = (
        f"{len(wrong)} of {total} blocks are not as they were written ({'; '.join(spread_of(wrong))}; {wrong[0].why})"
    )
    if not repair:
        raise OutputError(f"{said}; run emdvol verify --repair, then the command that made the output")
    click.echo(f"{said}. They are marked as not done: run the command that made the output again.")


def _print(output: Path, total: int, wrong: list[dict[str, Any]], repair: bool) -> None:
    """JSON; status 1 where something is wrong and stays so."""
    import json

    click.echo(json.dumps({"output": str(output), "blocks": total, "wrong": wrong, "repaired": repair}, indent=2))
    if wrong and not repair:
        raise click.exceptions.Exit(1)
