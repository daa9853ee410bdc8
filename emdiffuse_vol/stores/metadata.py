"""Attributes of a Zarr v3 group, as plain JSON.

Convention: ``zarr.json`` is replaced whole (written beside, fsync, rename), so a reader or a kill sees the old one or
the new.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from emdiffuse_vol.errors import OutputError
from emdiffuse_vol.stores.kvstore import reason, write_json


def read_attributes(group: Path) -> dict[str, Any]:
    """Empty where there is no Zarr v3 group."""
    try:
        content = json.loads((group / "zarr.json").read_text())
    except (OSError, ValueError):
        return {}
    attributes = content.get("attributes", {}) if isinstance(content, dict) else {}
    return attributes if isinstance(attributes, dict) else {}


def stamp(group: Path) -> tuple[int, ...]:
    """Another one when the attributes may have changed, without reading them; empty where there is no group."""
    try:
        with (group / "zarr.json").open("rb") as file:  # opened, so that network file systems look again
            found = os.fstat(file.fileno())
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def write_attributes(group: Path, attributes: dict[str, Any]) -> None:
    """Raises OutputError when they cannot be written."""
    content = json.loads((group / "zarr.json").read_text())
    try:
        write_json(str(group), "zarr.json", content | {"attributes": attributes})
    except ValueError as error:
        raise OutputError(f"{group} cannot be written: {reason(error)}") from error
