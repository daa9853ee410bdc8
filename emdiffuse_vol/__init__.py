"""emdiffuse_vol: isotropic volumes, with their uncertainty, from anisotropic volume EM.

Importing the package imports neither torch nor dask; the public names load on first use.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__", "isotropic", "open_volume"]


def __getattr__(name: str) -> object:
    if name == "isotropic":
        from emdiffuse_vol.reconstruct.lazy import isotropic

        return isotropic
    if name == "open_volume":
        from emdiffuse_vol.stores.opening import open_volume

        return open_volume
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
