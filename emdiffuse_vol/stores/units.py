"""Units of length as files spell them, in nanometres."""

from __future__ import annotations

# UDUNITS-2 names, as OME-NGFF wants them, and the abbreviations that files really carry (keys in lower case).
NANOMETRES = {
    **{"picometer": 1e-3, "pm": 1e-3},
    **{"angstrom": 0.1, "ångström": 0.1, "å": 0.1},
    **{"nanometer": 1.0, "nanometre": 1.0, "nm": 1.0},
    **{"micrometer": 1e3, "micrometre": 1e3, "micron": 1e3, "microns": 1e3, "um": 1e3, "µm": 1e3, "μm": 1e3},
    **{"millimeter": 1e6, "millimetre": 1e6, "mm": 1e6},
    **{"centimeter": 1e7, "centimetre": 1e7, "cm": 1e7},
    **{"meter": 1e9, "metre": 1e9, "m": 1e9, "inch": 2.54e7},
}


def nanometres(unit: str) -> float | None:
    """None when it is no unit of length we know. ImageJ writes its micro sign as an escape."""
    return NANOMETRES.get(unit.strip().replace("\\u00B5", "µ").lower())
