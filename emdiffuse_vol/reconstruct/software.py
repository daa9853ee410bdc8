"""What decides the bits of an output, besides its job: versions of what computes and of what writes."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from emdiffuse_vol import __version__

LIBRARIES = ("torch", "numpy", "tensorstore")


@cache  # asked for with every block, and packages do not change under a process
def software() -> dict[str, str]:
    return {"emdiffuse_vol": __version__, **{name: _version(name) for name in LIBRARIES}}


def _version(name: str) -> str:
    """Without loading it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
