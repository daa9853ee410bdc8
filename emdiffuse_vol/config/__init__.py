"""Configuration files: JSON to the frozen dataclasses of the layers below. The only place that reads config.

Convention: a file holds some of the keys of ``reconstruct.job.Request``; flags of the command line override it.
Unknown keys and values of a wrong type are refused with their path.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.executors.slurm import Slurm
from emdiffuse_vol.reconstruct.job import Request


def load_request(file: str | None, flags: dict[str, Any]) -> Request:
    """Settings of a JSON file (or none), overridden by ``flags``, whose None values mean "not given"."""
    from pydantic import TypeAdapter, ValidationError

    settings = read_json(file) if file else {}
    settings |= {key: value for key, value in flags.items() if value is not None}
    if isinstance(settings.get("cluster"), str):  # a file of its own, or an object inside this one
        settings["cluster"] = read_json(settings["cluster"])
    try:
        return TypeAdapter(Request).validate_python(settings)
    except ValidationError as error:
        raise ConfigError("; ".join(_phrase(e) for e in error.errors())) from None


def read_json(file: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(file).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read configuration {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"configuration {file} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"configuration {file} holds a {type(settings).__name__}, expected an object of settings")
    return settings


def _phrase(error: Any) -> str:
    path = ".".join(map(str, error["loc"]))
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        from dataclasses import fields

        inside = error["loc"][0] == "cluster" and len(error["loc"]) > 1
        known = ", ".join(field.name for field in fields(Slurm if inside else Request))
        return f"setting {path!r} is unknown; known: {known}"
    if error["type"] in ("missing", "missing_argument"):
        return f"setting {path!r} is missing; give it as a flag or in the configuration file"
    return f"setting {path!r}: {error['msg']}, found {error['input']!r}"
