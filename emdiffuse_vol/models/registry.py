"""Which weights have a name, and where the file is that a name, a path or a URL means. Knows no torch.

Convention. A name is that of a file without its suffix: weights that come with the package, then those that the user
has imported into :func:`folder`. A URL names its checksum, ``https://host/file.pth#sha256=HEX``; what it gives is kept
under ``downloads/HEX/`` of that folder and fetched once. Files appear in the folder whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from emdiffuse_vol.errors import WeightsError
from emdiffuse_vol.models.download import Notify, checksum, download, file_name, is_url, split_checksum

SUFFIX = ".safetensors"
SUFFIXES = (SUFFIX, ".pth")
# What of a header is used before anything else has looked at it.
MEANT: dict[str, Callable[[Any], bool]] = {
    "name": lambda value: isinstance(value, str),
    "modes": lambda value: isinstance(value, list) and all(isinstance(mode, str) for mode in value),
    "gaps": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_number, value)),
    "factor": lambda value: isinstance(value, int) and value >= 2,
    "calibration": lambda value: isinstance(value, dict),
    "origin": lambda value: isinstance(value, dict) and "file" in value,
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def folder() -> Path:
    """Where imported weights are: EMDVOL_MODELS, or a folder among the user's data. It need not exist."""
    if given := os.environ.get("EMDVOL_MODELS"):
        return _place(given)
    user = "~/Library/Application Support" if sys.platform == "darwin" else "~/.local/share"
    return _place(os.environ.get("XDG_DATA_HOME") or user) / "emdvol" / "models"


def _place(text: str) -> Path:
    """Absolute; ~ stays as it is for a user without a home, as there are in containers."""
    return Path(os.path.expanduser(text)).absolute()


def embedded() -> dict[str, Path]:
    """Weights that come with the package, by name."""
    return _files(Path(str(resources.files("emdiffuse_vol.models") / "weights")))


def imported() -> dict[str, Path]:
    """Weights that the user has imported, by name."""
    return _files(folder())


def names() -> dict[str, Path]:
    """All weights that have a name, the embedded first: nothing imported later hides them."""
    ours = embedded()
    return ours | {name: path for name, path in imported().items() if name not in ours}


def _files(place: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(place.glob(f"[!.]*{SUFFIX}")) if path.is_file()}


def find(text: str, sha256: str | None = None) -> Path:
    """The file that a name, a path or a URL means. Raises WeightsError.

    sha256: of the file, where the caller knows it: a path that is another machine's is then found here, too, as the
    weights of the same name or URL.
    """
    if is_url(text):
        return _cached(text)
    known = names()
    if text in known:
        return known[text]
    path = _place(text)
    if path.is_file():
        return path
    if sha256:
        twins = [known[path.stem]] if path.stem in known else []
        for twin in [*twins, *sorted((folder() / "downloads" / sha256).glob("[!.]*"))]:
            if checksum(twin) == sha256:
                return twin
    raise WeightsError(
        f"no weights {text}; give a file, a URL with its checksum, or a name among: {', '.join(known) or 'none'}"
    )


def _cached(text: str) -> Path:
    url, sha256 = split_checksum(text)
    if sha256 is None:
        raise WeightsError(
            f"weights {url} come without a checksum; add it to the URL as #sha256=HEX (emdvol models import prints it)"
        )
    name = file_name(url)
    if Path(name).suffix not in SUFFIXES:
        raise WeightsError(f"weights {url} are neither .safetensors nor a published .pth")
    path = folder() / "downloads" / sha256 / name
    if path.is_file() and checksum(path) == sha256:
        return path
    return fetch(url, path.parent, sha256)[0]


def fetch(url: str, place: Path, sha256: str | None, notify: Notify | None = None) -> tuple[Path, str]:
    """A file of weights from the network into the folder ``place``; verified if a checksum is given. -> file, sha256"""
    place.mkdir(parents=True, exist_ok=True)
    path = place / file_name(url)
    return path, download(url, path, sha256, notify)


def new_place(name: str, overwrite: bool) -> Path:
    """Where weights imported under a name will be. Raises WeightsError where the name cannot be had."""
    if not NAME.fullmatch(name) or name.endswith(SUFFIXES):
        raise WeightsError(
            f"{name!r} is no name for weights; use letters, digits, dots, dashes and underscores, and no file suffix"
        )
    if name in embedded():
        raise WeightsError(f"weights {name} come with the package; choose another name")
    path = folder() / f"{name}{SUFFIX}"
    if path.exists() and not overwrite:
        raise WeightsError(f"weights {name} exist already, in {path}; choose another name, or add --overwrite")
    return path


@dataclass(frozen=True)
class Header:
    """What a file of weights says of itself. ``facts``: all but the architecture, decoded."""

    architecture: str
    facts: dict[str, Any]
    parameters: int


def read_header(path: Path) -> Header:
    """Of a ``.safetensors``; the tensors are not read. Raises WeightsError."""
    try:
        with safe_open(path, framework="np") as file:
            said = dict(file.metadata() or {})
            parameters = sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"weights {path} are damaged or no safetensors file: {error}") from error
    architecture = said.pop("architecture", None)
    if architecture is None or not {"config", "modes"} <= said.keys():
        raise WeightsError(f"weights {path} lack architecture, config or modes in their header; write by save_weights")
    try:
        facts = {key: json.loads(value) for key, value in said.items()}
    except json.JSONDecodeError as error:
        raise WeightsError(f"weights {path} have a header that is not JSON: {error}") from error
    for key, meant in MEANT.items():
        if key in facts and not meant(facts[key]):
            raise WeightsError(f"weights {path} say {key} {facts[key]!r} in their header, which means nothing")
    return Header(architecture, facts, parameters)


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def summary(path: Path, header: Header) -> dict[str, Any]:
    """What a list of weights says of one file, as JSON values."""
    facts = header.facts
    return {
        "name": facts.get("name", path.stem),
        "architecture": header.architecture,
        "modes": facts["modes"],
        "gaps": served_gaps(facts),
        "factor": facts.get("factor"),
        "parameters": header.parameters,
        "bytes": path.stat().st_size,
        "calibrated": bool(facts.get("calibration", {}).get("scale")),
        "origin": _origin(path, facts),
        "path": str(path),
    }


def catalogue() -> list[dict[str, Any]]:
    """A summary of all weights that have a name; of a file that cannot be read, name, path, origin and error."""
    rows = []
    for name, path in names().items():
        try:
            rows.append(summary(path, read_header(path)) | {"name": name})
        except WeightsError as error:
            rows.append({"name": name, "path": str(path), "origin": _origin(path, {}), "error": str(error)})
    return rows


def served_gaps(facts: dict[str, Any]) -> tuple[float, float] | None:
    """[least, greatest] distance of sections in lateral pixels; None where the file does not say.

    Weights of one factor R serve what is nearest to R: FANC's sections, 10.5 pixels apart, are published as R = 10.
    """
    if "gaps" in facts:
        least, greatest = facts["gaps"]
        return float(least), float(greatest)
    return (facts["factor"] - 0.5, facts["factor"] + 0.5) if "factor" in facts else None


def _origin(path: Path, facts: dict[str, Any]) -> str:
    if path == embedded().get(path.stem):
        return "embedded"
    if "origin" in facts:
        kind = f" ({facts['origin']['kind']})" if facts["origin"].get("kind") else ""
        return f"imported from {facts['origin']['file']}{kind}"
    return "imported" if path.parent == folder() else "file"


def card_of(path: Path) -> str | None:
    """The model card, a .md beside the weights, if there is one."""
    card = path.with_suffix(".md")
    return card.read_text() if card.is_file() else None
