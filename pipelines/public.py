"""A region of a public volume: cut, reconstructed and reported. What `microns.py` and `fanc.py` share.

    FOLDER/input.zarr     the region, as it was published
    FOLDER/iso.zarr       the reconstruction
    FOLDER/report.html    what came out
    FOLDER/SOURCE.txt     where the region comes from, under which licence, and whom to cite

Convention: the place is the centre of the region in nm, z y x, in the coordinates of the published volume, as viewers
show them. The same command again continues what was interrupted. Options that are not the recipe's go to
`emdvol reconstruct`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from emdiffuse_vol.cli.main import main as command_line
from emdiffuse_vol.cli.options import FLOATS, INTS
from emdiffuse_vol.errors import EmdvolError, OutputError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.metadata import read_attributes
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.region import region_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class PublicVolume:
    """centre: nm, z y x, somewhere in the tissue. config: of `emdvol reconstruct`, in configs/."""

    name: str
    url: str
    page: str
    licence: str
    citation: str
    centre: str
    config: str


def main(public: PublicVolume, arguments: Sequence[str] | None = None) -> None:
    """Ends with a line and status 1 where something cannot be done."""
    parser = argparse.ArgumentParser(description=f"Cut a region of {public.name}, reconstruct it, report on it.")
    parser.add_argument("folder", type=Path, help="where everything is put")
    parser.add_argument("--url", default=public.url, help="a mirror or a copy of the volume [%(default)s]")
    parser.add_argument("--centre", metavar="Z,Y,X", default=public.centre, help="of the region, in nm [%(default)s]")
    parser.add_argument("--size", metavar="Z,Y,X", default="32,512,512", help="sections and pixels [%(default)s]")
    asked, settings = parser.parse_known_args(arguments)
    try:
        run(public, asked, settings)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except EmdvolError as error:
        sys.exit(f"Error: {error}")


def run(public: PublicVolume, asked: argparse.Namespace, settings: Sequence[str]) -> None:
    stack, out = asked.folder / "input.zarr", asked.folder / "iso.zarr"
    box = region(asked)
    asked.folder.mkdir(parents=True, exist_ok=True)
    about = [public.name, f"{box} of {asked.url}", public.page, public.licence, public.citation]
    (asked.folder / "SOURCE.txt").write_text("\n".join(about) + "\n")
    if not stack.exists():
        roi = ",".join(f"{a}:{b}" for a, b in zip(box.start, box.stop, strict=True))
        emdvol("export", asked.url, stack, "--format", "ome-zarr", "--roi", roi)
    emdvol("info", stack)
    emdvol("reconstruct", stack, "--out", out, "--config", CONFIGS / public.config, *settings)
    emdvol("report", out, "--out", asked.folder / "report.html")


def region(asked: argparse.Namespace) -> Box:
    """In voxels of the volume. Raises EmdvolError where it is not inside, or FOLDER holds another one."""
    centre, size = FLOATS.convert(asked.centre, None, None), INTS.convert(asked.size, None, None)
    volume = open_volume(asked.url)
    spec = volume.spec
    places = zip(centre, size, spec.origin, spec.voxel_size, strict=True)
    start = [round((c - origin) / nm - n / 2) for c, n, origin, nm in places]
    box = Box(tuple(start), tuple(a + n for a, n in zip(start, size, strict=True)))
    expected = region_of(volume, box).spec.identity
    made = read_attributes(asked.folder / "input.zarr").get("emdvol")
    if made is not None and made.get("source") != expected:
        raise OutputError(f"{asked.folder}/input.zarr is another region or of another volume; choose another folder")
    return box


def emdvol(*arguments: object) -> None:
    """As on the command line, in this process."""
    words = [str(a) for a in arguments]
    click.echo(f"$ emdvol {' '.join(words)}")
    command_line(words, standalone_mode=False)
