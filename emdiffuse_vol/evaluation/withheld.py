"""How good a run is where nobody has the truth: what can be said from the stack and its reconstruction alone.

    withheld     every other section is taken away, predicted from the rest and compared: a harder task than the run's,
                 as sections are twice as far apart
    texture      detail along z over detail along y and x of the reconstruction; in tissue without a direction, 1
    seams        whether faces between blocks differ from others

Convention: a part in the middle is looked at, at most ``SECTIONS`` x ``SIDE`` x ``SIDE`` voxels of the input and
``CUBE`` voxels along each axis of the output, whatever the size of the volume.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.metrics.features import fsim
from emdiffuse_vol.metrics.image import psnr, ssim
from emdiffuse_vol.metrics.interpolation import linear
from emdiffuse_vol.metrics.seams import face_differences, seam
from emdiffuse_vol.metrics.spectra import axial_power
from emdiffuse_vol.metrics.spread import score_spread
from emdiffuse_vol.reconstruct.lazy import isotropic
from emdiffuse_vol.stores.volume import Volume

SECTIONS, SIDE = 25, 256
CUBE = 256
BANDS = (1 / 16, 1 / 8, 3 / 16, 1 / 4)  # cycles per voxel


def middle(shape: Triple, most: Triple) -> Box:
    """The middle of a volume, no larger than ``most``."""
    sizes = tuple(min(n, m) for n, m in zip(shape, most, strict=True))
    start = tuple((n - s) // 2 for n, s in zip(shape, sizes, strict=True))
    return Box(start, tuple(a + s for a, s in zip(start, sizes, strict=True)))  # type: ignore[arg-type]


def withheld(stack: Volume, **settings: Any) -> dict[str, Any]:
    """stack: the input of a run; settings: of ``isotropic``, its weights and mode among them. Greys as stored.

    Raises InputError for fewer than five sections, and WeightsError where sections twice as far apart are too far.
    """
    import xarray as xr

    spec = stack.spec
    if spec.shape[0] < 5:
        raise InputError(f"{stack.url} has {spec.shape[0]} sections; to withhold every other one takes five at least")
    box = middle(spec.shape, (SECTIONS, SIDE, SIDE))
    known = stack.read(box)
    known = known[: (len(known) - 1) // 2 * 2 + 1]  # from the first kept to the last kept
    z, y, x = spec.voxel_size
    made = isotropic(
        xr.DataArray(known[::2], dims=("z", "y", "x")), voxel_size=(2 * z, y, x), factor=2, **settings
    ).compute(scheduler="synchronous")
    data_range = float(np.ptp(known)) if known.dtype.kind == "f" else float(np.iinfo(known.dtype).max)
    truth, mean, plain = known[1::2], made["mean"].values[1::2], linear(known[::2], 2)[1::2]
    spread = score_spread(mean, made["uncertainty"].values[1::2], truth)
    scores = {
        name: {
            "psnr": psnr(image, truth, data_range),
            "ssim": ssim(image, truth, data_range),
            "fsim": fsim(image, truth, data_range),
        }
        for name, image in (("reconstruction", mean), ("linear", plain))
    }
    return {
        "box": str(box),
        "sections": len(truth),
        "gap_nm": 2 * z,
        **scores,
        "coverage": spread.coverage,
        "spread_skill": spread.spread_skill,
    }


def texture(mean: Volume) -> dict[str, Any]:
    """Power along z over that along y and x, in bands of frequency, and its band from nothing to half the highest."""
    greys = mean.read(middle(mean.spec.shape, (CUBE, CUBE, CUBE)))
    power = axial_power(greys)
    bands = {}
    for low, high in zip((0.0, *BANDS[:-1]), BANDS, strict=True):
        inside = (power.frequency > low) & (power.frequency <= high)
        inside[0] = False
        if inside.any():
            bands[f"{high:g}"] = float(np.exp(np.log(power.value[inside]).mean()))
    return {"axial_over_lateral_power": bands}


def seams(mean: Volume, block: Triple) -> dict[str, Any]:
    """At faces between blocks, y and x: the ratio to other faces, and its standard error where there is no seam. Along
    z faces differ by their distance from a section. Empty where the part looked at holds no such face."""
    result = {}
    shape = mean.spec.shape
    for axis, name in ((1, "y"), (2, "x")):
        faces = np.arange(block[axis] - 1, shape[axis] - 1, block[axis])
        if not faces.size:
            continue
        centre = int(faces[len(faces) // 2])
        box = middle(shape, (64, CUBE, CUBE))
        start, stop = list(box.start), list(box.stop)
        start[axis] = max(0, min(centre - CUBE // 2, shape[axis] - CUBE))
        stop[axis] = min(shape[axis], start[axis] + CUBE)
        greys = mean.read(Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
        inside = [int(f) - start[axis] for f in faces if start[axis] <= f < stop[axis] - 1]
        found = seam(face_differences(greys, axis), inside)
        result[name] = {"ratio": found.ratio, "error": found.error}
    return result
