"""What each task means, as geometry: which input voxels an output voxel depends on, and where it lies."""

from __future__ import annotations

from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.modes.isotropic import Isotropic, isotropic_mode

__all__ = ["MODES", "Isotropic", "check_mode", "isotropic_mode"]

# The two differ in what their weights were trained on, not in what happens to a volume.
MODES = {
    "vEMDiffuse-i": "isotropic reconstruction, weights trained on an isotropic volume",
    "vEMDiffuse-a": "isotropic reconstruction, weights that needed no isotropic volume of this tissue",
}


def check_mode(name: str) -> str:
    if name not in MODES:
        raise ConfigError(f"mode {name!r} is unknown; choose one of {', '.join(MODES)}")
    return name
