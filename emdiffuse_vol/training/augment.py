"""What other microscopes, other preparations and bad luck do to sections, done to crops.

Convention: every function takes a generator and a crop and returns a crop. ``truth`` changes only where it is another
picture of the same tissue (grey scale, contrast); what spoils the sections leaves it alone, so the network learns to
mend it. Each happens with its own probability.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter, shift

from emdiffuse_vol.training.crops import Crop
from emdiffuse_vol.training.volumes import FloatArray

Change = Callable[[np.random.Generator, Crop], Crop]


@dataclass(frozen=True)
class Augment:
    """Probabilities. The first two show the same tissue as another microscope would, and are on by default;
    ``thickness`` is that of sections that average planes (see ``crops.cut_crop``)."""

    greys: float = 1.0
    contrast: float = 0.5
    blur: float = 0.0
    noise: float = 0.0
    misalignment: float = 0.0
    lost: float = 0.0
    thickness: float = 0.0


def augment(rng: np.random.Generator, crop: Crop, chances: Augment) -> Crop:
    """A draw is made for each change whether it happens or not, so that switching one off leaves the others alone."""
    for name, change in CHANGES.items():
        seed = int(rng.integers(2**62))
        if rng.random() < getattr(chances, name):
            crop = change(np.random.default_rng(seed), crop)
    return crop


def stretch_greys(rng: np.random.Generator, crop: Crop) -> Crop:
    """Gain 0.8 to 1.25 and offset up to 0.15 of half the grey range."""
    gain, offset = np.float32(rng.uniform(0.8, 1.25)), np.float32(rng.uniform(-0.15, 0.15))
    return replace(crop, sections=crop.sections * gain + offset, truth=crop.truth * gain + offset)


def bend_contrast(rng: np.random.Generator, crop: Crop) -> Crop:
    """A grey curve that lifts or lowers the middle greys by up to 0.15 and keeps black and white; rising up to greys of
    3, and straight beyond."""
    bend = np.float32(rng.uniform(-0.15, 0.15))

    def curve(greys: FloatArray) -> FloatArray:
        bent: FloatArray = greys + bend * (1 - np.square(greys.clip(-3, 3)))
        return bent

    return replace(crop, sections=curve(crop.sections), truth=curve(crop.truth))


def blur_sections(rng: np.random.Generator, crop: Crop) -> Crop:
    """Each section out of focus with probability 1/2, by up to 1.5 pixels."""
    sections = [
        gaussian_filter(section, sigma) if (sigma := rng.uniform(-1.5, 1.5)) > 0 else section
        for section in crop.sections
    ]
    return replace(crop, sections=np.stack(sections))


def add_noise(rng: np.random.Generator, crop: Crop) -> Crop:
    """Shorter dwell time: white noise of up to 0.3 on the sections, alike for all."""
    level = rng.uniform(0, 0.3)
    noise = rng.standard_normal(crop.sections.shape, np.float32) * np.float32(level)
    return replace(crop, sections=crop.sections + noise)


def misalign(rng: np.random.Generator, crop: Crop) -> Crop:
    """Each section displaced by about a pixel: normal of 0.7 in y and x."""
    sections = [shift(s, rng.normal(0, 0.7, 2), order=1, mode="nearest") for s in crop.sections]
    return replace(crop, sections=np.stack(sections))


def lose_section(rng: np.random.Generator, crop: Crop) -> Crop:
    """The first or last context section gone: dark, or a copy of its neighbour."""
    sections = crop.sections.copy()
    place, neighbour = ((0, 1), (-1, -2))[int(rng.integers(2))]
    sections[place] = np.float32(-1) if rng.random() < 0.5 else sections[neighbour]
    return replace(crop, sections=sections)


CHANGES: dict[str, Change] = {
    "greys": stretch_greys,
    "contrast": bend_contrast,
    "blur": blur_sections,
    "noise": add_noise,
    "misalignment": misalign,
    "lost": lose_section,
}
