"""What each task means, as geometry: which input voxels an output voxel depends on, and where it lies.

A run has a mode, or a *chain* of two joined by +: sections are restored, then planes are predicted between them.
"""

from __future__ import annotations

from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.modes.chain import Chain
from emdiffuse_vol.modes.isotropic import Isotropic, isotropic_mode
from emdiffuse_vol.modes.mode import Mode
from emdiffuse_vol.modes.sections import SectionWise

__all__ = [
    "ISOTROPIC",
    "MODES",
    "SECTION_WISE",
    "Chain",
    "Isotropic",
    "Mode",
    "SectionWise",
    "check_mode",
    "isotropic_mode",
    "stages_of",
]

# The two differ in what their weights were trained on, not in what happens to a volume.
ISOTROPIC = {
    "vEMDiffuse-i": "isotropic reconstruction, weights trained on an isotropic volume",
    "vEMDiffuse-a": "isotropic reconstruction, weights that needed no isotropic volume of this tissue",
}
SECTION_WISE = {
    "EMDiffuse-n": "sections denoised",
    "EMDiffuse-r": "sections with more pixels than were measured",
    "FastScan-s": "fast scans restored, weights trained on slow scans of the same places",
    "FastScan-ss": "fast scans restored, weights that needed no slow scan",
}
MODES = ISOTROPIC | SECTION_WISE


def check_mode(name: str) -> str:
    """Raises ConfigError for what is neither a mode nor a section-wise one followed by an isotropic one."""
    known = ", ".join(MODES)
    match name.split("+"):
        case [one] if one in MODES:
            return name
        case [first, then] if first in SECTION_WISE and then in ISOTROPIC:
            return name
        case [_]:
            raise ConfigError(f"mode {name!r} is unknown; choose one of {known}, or a chain of two joined by +")
    raise ConfigError(
        f"mode {name!r} is no chain; join one of {', '.join(SECTION_WISE)} to one of {', '.join(ISOTROPIC)} by a +"
    )


def stages_of(mode: str) -> tuple[str | None, str | None]:
    """A checked mode -> what is done to sections, and what between them."""
    first, _, then = mode.rpartition("+")
    if then in SECTION_WISE:
        return then, None
    return first or None, then
