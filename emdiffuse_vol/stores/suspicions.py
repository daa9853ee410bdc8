"""What greys themselves say against a volume's metadata: inverted contrast, axes in another order.

Convention: suspicions, not errors; each rests on a median over patches spread over the volume, so that a bright nucleus
or a fold decides nothing. Tried on seven stacks (serial sections, FIB-SEM whole and thinned): none is suspected
as it is, six are with inverted greys, and four of five anisotropic ones with their axes turned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.stores.volume import Volume, VolumeSpec

WINDOWS = (5, 9, 15)  # pixels: wider than membranes, narrower than cells
SMALLEST, FEWEST = 32, 8  # of a patch that tells something, and how many are needed
BRIGHT, AGREEING = -0.01, 0.6

PLACES, DEEP, PATCH = 8, 8, 64
ANISOTROPIC = 1.5  # from here on z should be the axis along which greys change most
OTHER_AXIS = 1.3


def contrast(patch: NDArray[np.float64]) -> float:
    """-1..1, positive where what is thin is darker than what is around it, as membranes are.

    Black and white top hats of [y, x] are the greys that closing adds and that opening takes away; (black - white) /
    (black + white), mean over WINDOWS. Turns its sign with the contrast.
    """
    from scipy.ndimage import gaussian_filter, grey_closing, grey_opening

    smooth = gaussian_filter(patch, 1)
    found = []
    for window in WINDOWS:
        black = (grey_closing(smooth, size=(window, window)) - smooth).mean()
        white = (smooth - grey_opening(smooth, size=(window, window))).mean()
        found.append(float((black - white) / (black + white)) if black + white else 0.0)
    return float(np.mean(found))


def contrast_problems(patches: Sequence[NDArray[np.float64]]) -> Iterator[str]:
    """patches: [y, x] of sections that are not constant."""
    values = np.array([contrast(p) for p in patches if min(p.shape) >= SMALLEST and np.isfinite(p).all()])
    if len(values) < FEWEST or np.median(values) > BRIGHT or (share := np.mean(values < 0)) < AGREEING:
        return
    yield (
        f"contrast may be inverted: thin structures are bright in {share:.0%} of the sample, expected dark membranes; "
        "if so, reconstruct with --invert"
    )


def suspect_contrast(volume: Volume) -> Iterator[str]:
    """The same from a few patches in the middle of the volume: a quick look."""
    greys = [volume.read(box).astype(np.float64) for box in _places(volume.spec)]
    patches = [patch for part in greys for patch in part if patch.min() < patch.max()]
    chosen = patches[:: max(1, len(patches) // (2 * PLACES))]
    yield from contrast_problems(chosen)


def axis_problems(volume: Volume) -> Iterator[str]:
    """Where z is said to be the coarsest axis, neighbours along it should differ most."""
    spec = volume.spec
    z, y, x = spec.voxel_size
    if z / ((y + x) / 2) < ANISOTROPIC:
        return
    steps = []
    for box in _places(spec):
        greys = volume.read(box).astype(np.float64)
        if min(greys.shape) > 1 and np.isfinite(greys).all() and greys.min() < greys.max():
            steps.append([np.abs(np.diff(greys, axis=axis)).mean() for axis in range(3)])
    if not steps:
        return
    dz, dy, dx = np.median(steps, axis=0).tolist()
    axis, most = max((("y", dy), ("x", dx)), key=lambda pair: pair[1])
    if most > OTHER_AXIS * max(dz, min(dy, dx)):
        yield f"greys change most along {axis} ({most:.3g} a voxel, {dz:.3g} along z): check the order of the axes"


def _places(spec: VolumeSpec) -> Iterator[Box]:
    """Boxes evenly spread along z, in the middle of y and x."""
    depth, height, width = spec.shape
    top, left = max(0, (height - PATCH) // 2), max(0, (width - PATCH) // 2)
    for start in sorted({(depth - DEEP) * i // (PLACES - 1) if depth > DEEP else 0 for i in range(PLACES)}):
        yield Box((start, top, left), (start + DEEP, top + PATCH, left + PATCH)) & Box.of(spec.shape)
