"""The command `emdvol`. Each command lives in its own file and is imported only when it runs."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from typing import Any

import click

from emdiffuse_vol import __version__
from emdiffuse_vol.cli.options import Group
from emdiffuse_vol.errors import EmdvolError

# name -> (module, one line for the overview). The command in each module is called ``command``.
COMMANDS = {
    "reconstruct": "Make an anisotropic volume isotropic, with its uncertainty.",
    "restore": "Denoise or super-resolve an image or a stack, section by section.",
    "work": "Do a part of a run without a scheduler.",
    "plan": "Say what a run would cost, before it starts.",
    "status": "Show how far a run is.",
    "verify": "Check an output against its ledger.",
    "report": "Write a page about an output: pictures, reliability, speed, provenance.",
    "view": "Open an output in neuroglancer, beside its input.",
    "convert": "Turn any volume into OME-Zarr.",
    "export": "Write a reconstruction as TIFF, HDF5, N5 or precomputed.",
    "info": "Print shape, voxel size, greys and factor of a volume.",
    "sample": "Write a procedural EM-like volume of any size.",
    "models": "List, show, import and check weights.",
    "register": "Bring images or stacks onto each other, or straighten the drift of one.",
    "train": "Train a network on volumes or pairs of your own.",
    "tune": "Find what is fastest on this machine.",
    "evaluate": "Score a reconstruction against a truth volume.",
    "doctor": "Say what is installed, what is here, and how to get what is missing.",
    "completion": "Print what a shell needs to complete commands and options.",
}


class Ended(click.ClickException):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.exit_code = status  # type: ignore[misc]


class Commands(Group):
    """Lists the commands without importing them; turns our errors into one line and exit status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"emdiffuse_vol.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EmdvolError as error:
            raise Ended(" ".join(str(error).split()), error.exit_status) from error
        except OSError as error:  # a disk, a permission or a path: not a bug of ours, not a matter for a traceback
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="emdvol")
@click.option("-v", "--verbose", count=True, help="Log what goes into events.jsonl; -vv: what libraries log, too.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bars: results and errors alone.")
def main(verbose: int, quiet: bool) -> None:
    """Isotropic volume EM with a trustworthy number beside every voxel."""
    if verbose:
        import logging

        logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
        logging.getLogger(None if verbose > 1 else "emdiffuse_vol").setLevel(logging.INFO)


def run() -> None:
    """The program. Blocks that are abandoned still compute in their threads: the process ends without them."""
    try:
        main()
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        from emdiffuse_vol.executors.local import THREAD

        if any(thread.name.startswith(THREAD) for thread in threading.enumerate()):
            os._exit(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
        raise
