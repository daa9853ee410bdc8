"""Configuration files: JSON to the frozen dataclasses of the layers below. The only place that reads config.

Convention: a file holds some of the keys of ``reconstruct.job.Request``, or of ``training.train.Request``; flags of the
command line override it. Unknown keys and values of a wrong type are refused with their path.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.reconstruct.job import Request

if TYPE_CHECKING:
    from emdiffuse_vol.training.train import Request as TrainRequest

T = TypeVar("T")


def load_request(file: str | None, flags: dict[str, Any]) -> Request:
    """Settings of a JSON file (or none), overridden by ``flags``, whose None values mean "not given"."""
    settings = read_json(file) if file else {}
    settings |= {key: value for key, value in flags.items() if value is not None}
    if isinstance(settings.get("cluster"), str):  # a file of its own, or an object inside this one
        settings["cluster"] = read_json(settings["cluster"])
    return _validated(Request, settings)


# A short run from good weights: a lower rate, spread and mean together from the start.
TUNING: dict[str, Any] = {
    "minutes": 3,
    "learning_rate": 5e-4,
    "warmup": 20,
    "decay": 0.5,
    "members_from": 0,
    "ema": 0.99,
}


def load_training(file: str | None, flags: dict[str, Any]) -> TrainRequest:
    """Settings of a JSON file, overridden by ``flags``: those of ``fit`` are flags too. Without a file the weights that
    ``start_from`` names are tuned. Relative paths of data are relative to the current folder, as on a command line."""
    from emdiffuse_vol.training.train import Request as TrainRequest

    settings = read_json(file) if file else tuning(flags.get("start_from"))
    given = {key: value for key, value in flags.items() if value is not None}
    of_fit = {key: given.pop(key) for key in ("steps", "minutes", "seed") if key in given}
    settings |= given
    if of_fit and isinstance(settings.setdefault("fit", {}), dict):
        settings["fit"] |= of_fit
    return _validated(TrainRequest, settings)


def tuning(start_from: str | None) -> dict[str, Any]:
    """What to train where weights are to be tuned on what they have not seen. Raises ConfigError and WeightsError."""
    from emdiffuse_vol.models import registry

    if start_from is None:
        raise ConfigError("there is nothing to train; give a configuration file, or --from weights and a --pair")
    facts = registry.read_header(registry.find(start_from)).facts
    return {"mode": facts["modes"][0], "factor": facts.get("factor", 1), "batch": 8, "patch": 96, "fit": TUNING.copy()}


def _validated(kind: type[T], settings: dict[str, Any]) -> T:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        raise ConfigError("; ".join(_phrase(kind, e) for e in error.errors())) from None


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


def _phrase(kind: type[Any], error: Any) -> str:
    path = ".".join(map(str, error["loc"]))
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = ", ".join(_known(kind, error["loc"][:-1]))
        return f"setting {path!r} is unknown; known: {known}"
    if error["type"] in ("missing", "missing_argument"):
        return f"setting {path!r} is missing; give it as a flag or in the configuration file"
    return f"setting {path!r}: {error['msg']}, found {error['input']!r}"


def _known(kind: Any, path: tuple[str | int, ...]) -> list[str]:
    """Names of the settings at a place inside nested dataclasses."""
    from dataclasses import fields, is_dataclass

    for name in path:
        if isinstance(name, str):
            inside = get_type_hints(kind)[name]
            kind = next((part for part in (inside, *get_args(inside)) if is_dataclass(part)), kind)
    return [field.name for field in fields(kind)]
