"""emdiffuse_vol: isotropic volumes, with their uncertainty, from anisotropic volume EM.

Importing the package imports neither torch nor dask; the public names load on first use.
"""

from __future__ import annotations

__version__ = "0.1.0"
