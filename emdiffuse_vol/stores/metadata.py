"""Attributes of a Zarr v3 group, as plain JSON.

Convention: ``zarr.json`` is replaced whole (written beside, fsync, rename), so a reader or a kill sees the old one or
the new.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_attributes(group: Path) -> dict[str, Any]:
    """Empty where there is no Zarr v3 group."""
    try:
        content = json.loads((group / "zarr.json").read_text())
    except (OSError, ValueError):
        return {}
    attributes = content.get("attributes", {}) if isinstance(content, dict) else {}
    return attributes if isinstance(attributes, dict) else {}


def write_attributes(group: Path, attributes: dict[str, Any]) -> None:
    path = group / "zarr.json"
    content = json.loads(path.read_text())
    content["attributes"] = attributes
    fresh = path.with_suffix(".new")
    with fresh.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
