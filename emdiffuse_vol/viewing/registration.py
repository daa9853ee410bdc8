"""What a registration has done, as one PNG: both images overlaid before and after, the flow, and the confidence.

Convention: overlays show the fixed image in magenta and the moving one in green, so that what coincides is grey. The
flow is a hue for its direction (red: to the right; yellow-green: down) and a saturation for its length.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.viewing.panels import Greys, Panel, draw_panels


def draw_registration(
    path: str | os.PathLike[str],
    fixed: Greys,
    before: Greys,
    after: Greys,
    flow: NDArray[Any],
    confidence: NDArray[Any],
    pixel_nm: float,
    width: int = 1400,
) -> None:
    """Images [y, x] of one shape; before: the moving one as it was; flow: [2, y, x] in pixels, y and x; confidence: 0
    to 1. Raises OutputError when matplotlib is missing or the file cannot be written."""
    length = float(np.percentile(np.hypot(*flow), 99.5))
    panels = [
        Panel("Before: fixed magenta, moving green", overlay(fixed, before), (0, 1)),
        Panel("After", overlay(fixed, after), (0, 1)),
        Panel(f"Flow: hue is direction, full colour {max(length, 0.1):.1f} px", flow_colours(flow, length), (0, 1)),
        Panel("Confidence", confidence, (0.0, 1.0), "viridis", bar=True, unit=""),
    ]
    draw_panels(path, panels, pixel_nm, width)


def overlay(fixed: Greys, moving: Greys) -> NDArray[np.float32]:
    """[y, x, 3], 0 to 1: each image on its own grey scale; black in the moving one is taken for nothing."""
    first, second = (_scaled(image) for image in (fixed, moving))
    return np.stack([first, second, first], axis=-1)


def _scaled(image: Greys) -> NDArray[np.float32]:
    seen = image[image != 0] if (image != 0).any() else image
    low, high = np.percentile(seen, (0.5, 99.5))
    return np.asarray(np.clip((image - low) / max(high - low, 1e-6), 0, 1), np.float32)


def flow_colours(flow: NDArray[Any], length: float) -> NDArray[np.float32]:
    """[y, x, 3]: white where nothing moves, full colour at ``length`` pixels."""
    angle = np.arctan2(flow[0], flow[1])
    strength = np.clip(np.hypot(*flow) / max(length, 0.1), 0, 1)[..., None]
    phases = np.array([0, 2, 4]) * np.pi / 3
    colour = 0.5 + 0.5 * np.cos(angle[..., None] - phases)
    return np.asarray(1 - strength * (1 - colour), np.float32)
