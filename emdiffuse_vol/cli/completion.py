"""`emdvol completion`: what a shell needs to complete commands and options."""

from __future__ import annotations

import click

# Where each shell looks; click writes the scripts.
PLACES = {
    "bash": 'eval "$(emdvol completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(emdvol completion zsh)" in ~/.zshrc, after compinit',
    "fish": "emdvol completion fish > ~/.config/fish/completions/emdvol.fish",
}


@click.command(epilog="\b\n" + "\n".join(PLACES.values()))
@click.argument("shell", type=click.Choice(list(PLACES)))
def command(shell: str) -> None:
    """Print a script that teaches SHELL to complete commands, options and their values."""
    from click.shell_completion import get_completion_class

    from emdiffuse_vol.cli.main import main

    found = get_completion_class(shell)
    assert found is not None
    # Without the check of the version of bash, which needs bash itself, in click's own source().
    completion = found(main, {}, "emdvol", "_EMDVOL_COMPLETE")
    click.echo(completion.source_template % completion.source_vars())
