"""`emdvol train`: weights from a user's own data."""

from __future__ import annotations

import os
from typing import Any

import click


@click.command()
@click.argument("config", required=False)
@click.option("--out", help="Folder of the run; the same command again continues it.")
@click.option("--name", help="Name of the weights.  [default: that of the folder]")
@click.option("--from", "start_from", metavar="WEIGHTS", help="Name or file of weights to begin with.")
@click.option("--pair", nargs=2, metavar="CONDITION TARGET", help="Registered images, instead of the file's pairs.")
@click.option("--steps", type=click.IntRange(min=1), help="Number of steps.")
@click.option("--minutes", type=float, help="Time to spend, instead of a number of steps.")
@click.option("--seed", type=int, help="Of everything drawn.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.  [default: auto]")
def command(config: str | None, pair: tuple[str, str] | None, **flags: Any) -> None:
    """Train a network as the JSON file CONFIG says; without one, tune the weights of --from on a --pair, for minutes.
    Under `torchrun` it trains on several devices."""
    from emdiffuse_vol.config import load_training

    if pair:
        flags["pairs"] = [{"condition": pair[0], "target": pair[1]}]
    request = load_training(config, flags)

    from emdiffuse_vol.cli.progress import training_bar
    from emdiffuse_vol.training.train import train

    if os.environ.get("RANK", "0") != "0":  # of several processes the first speaks
        train(request)
        return
    with training_bar() as notify:
        path = train(request, notify)
    click.echo(f"{path} is complete; use it with --weights {path}.")
