"""Weights of others, or from elsewhere, made weights with a name: ``emdvol models import``.

Convention. What is imported is verified, loaded strictly (every key and shape) and written anew as ``.safetensors`` in
``registry.folder()``, float32, with an ``origin`` in its header: ``file``, its ``sha256``, the ``url`` if any, and
``kind``, "raw" or "EMA" where the published name tells. A source is a file, or the PREFIX of published ones:
``PREFIX_Network.pth`` and ``PREFIX_Network_ema.pth``; either may be a URL.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from emdiffuse_vol.errors import OutputError, WeightsError
from emdiffuse_vol.models import registry
from emdiffuse_vol.models.checkpoints import Weights, load_weights, save_weights
from emdiffuse_vol.models.download import (
    Notify,
    checked_hex,
    checksum,
    file_name,
    is_url,
    public,
    split_checksum,
    write_durably,
)

RAW, EMA = "_Network.pth", "_Network_ema.pth"
# The distance of the sections is no input of these: a file serves the factor it was trained on.
ONE_FACTOR = ("unet-vem",)


def import_weights(
    source: str,
    name: str,
    *,
    sha256: str | None = None,
    ema: bool = False,
    factor: int | None = None,
    mode: str | None = None,
    overwrite: bool = False,
    notify: Notify | None = None,
) -> Weights:
    """Make ``source`` the weights ``name`` of this user. Raises WeightsError or OutputError; then nothing
    has changed."""
    place = registry.new_place(name, overwrite)
    url, expected = split_checksum(source) if is_url(source) else (None, None)
    if sha256 is not None:
        sha256 = checked_hex(sha256)
        if expected not in (None, sha256):
            raise WeightsError(f"--sha256 {sha256} is not what the URL says, {expected}; give one of them")
    expected = sha256 or expected
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".import-") as temporary:
        if url:
            url = published(url, ema)
            path, found = registry.fetch(url, Path(temporary), expected, notify)
        else:
            path = Path(published(os.path.abspath(os.path.expanduser(source)), ema))
            if not path.is_file():
                raise WeightsError(f"no weights {path}; give a .safetensors or .pth file, a published PREFIX, or a URL")
            found = checksum(path)
            if expected not in (None, found):
                raise WeightsError(f"weights {path} have SHA-256 {found}, expected {expected}; not imported")
        weights = load_weights(str(path))
        facts = facts_of(weights, mode, factor) | {"name": name, "origin": origin_of(path.name, found, url)}
        converted = Path(temporary) / "converted"
        try:
            save_weights(converted, weights.net, architecture=weights.architecture, config=weights.config, **facts)
        except SafetensorError as error:  # what the library makes of a full disk
            raise OutputError(f"weights cannot be written to {place.parent}: {error}") from error
        card = registry.card_of(path)
        write_durably(place, converted.read_bytes())
    if card is None:
        place.with_suffix(".md").unlink(missing_ok=True)  # of the weights that were here before
    else:
        write_durably(place.with_suffix(".md"), card.encode())
    return load_weights(name)


def published(source: str, ema: bool) -> str:
    """The file that a path or a URL means: itself, or for a PREFIX the raw or the EMA weights."""
    suffix = Path(file_name(source) if is_url(source) else source).suffix
    if suffix in (".zip", ".tar", ".gz"):
        raise WeightsError(f"{source} is an archive; unpack it, then give the PREFIX of PREFIX{RAW} in it")
    if suffix not in registry.SUFFIXES:
        if not is_url(source):
            return source if Path(source).is_file() else source + (EMA if ema else RAW)
        head, mark, query = source.partition("?")
        return head + (EMA if ema else RAW) + mark + query
    if ema and not Path(file_name(source) if is_url(source) else source).name.endswith(EMA):
        raise WeightsError(f"--ema chooses between two files of a PREFIX, and {source} is one file; leave it out")
    return source


def facts_of(weights: Weights, mode: str | None, factor: int | None) -> dict[str, Any]:
    """The header of imported weights: what was said of them, narrowed to one mode or factor."""
    facts = dict(weights.metadata)
    if mode is not None:
        if mode not in facts["modes"]:
            raise WeightsError(f"weights {weights.name} serve {', '.join(facts['modes'])}, not {mode}")
        facts["modes"] = [mode]
    if factor is not None:
        if weights.architecture not in ONE_FACTOR:
            raise WeightsError(f"--factor is of published vEMDiffuse weights, these are {weights.architecture}")
        if factor < 2:
            raise WeightsError(f"factor {factor} makes no new planes; give a whole --factor from 2")
        if facts.get("factor", factor) != factor:
            raise WeightsError(f"weights {weights.name} serve factor {facts['factor']} alone, not {factor}")
        facts["factor"] = factor
    return facts


def origin_of(file: str, sha256: str, url: str | None) -> dict[str, Any]:
    kind = "EMA" if file.endswith(EMA) else "raw" if file.endswith(RAW) else None
    said = {"file": file, "sha256": sha256, "kind": kind, "url": public(url) if url else None}
    return {key: value for key, value in said.items() if value is not None}
