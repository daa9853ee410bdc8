"""Images and stacks restored into files like their own: a run whose output is taken apart again.

Convention: the run is in ``.NAME.restoring.zarr`` beside the target, so one that was killed goes on; it is removed once
the files are there. Two files are made: the mean, and its uncertainty as codes (greys = code * step).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from emdiffuse_vol.errors import InputError, OutputError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.reconstruct.engine import Notify
from emdiffuse_vol.reconstruct.greys import Codes
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.reliability import Reliability, reliability
from emdiffuse_vol.reconstruct.run import reconstruct
from emdiffuse_vol.stores.export import export, format_of
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.png import check_png, write_png
from emdiffuse_vol.stores.volume import Volume

PNG = "png"
NO_SIZE = (1.0, 1.0, 1.0)  # nm; of an image that does not say, where nothing depends on it


@dataclass(frozen=True)
class Restored:
    """step: greys for a code of the uncertainty."""

    mean: Path
    uncertainty: Path
    step: float
    reliability: Reliability


def restore(request: Request, notify: Notify = lambda progress: None) -> Restored:
    """``request.out`` is the file to write: TIFF, PNG (one section), HDF5, N5. Raises OutputError where it exists and
    may not be replaced, and the errors of a run."""
    mean = Path(request.out)
    uncertainty = mean.with_name(f"{mean.stem}_uncertainty{mean.suffix}")
    format = PNG if mean.suffix.lower() == ".png" else format_of(str(mean))
    if format in (None, "ome-zarr"):
        raise OutputError(f"{mean} is no .tif, .png, .h5 or .n5; for OME-Zarr use emdvol reconstruct")
    for path in (mean, uncertainty):
        if path.exists() and not request.overwrite:
            raise OutputError(f"{path} exists; choose another --out, or add --overwrite")
    volume = _open(request)
    if format == PNG:
        check_png(mean, volume.spec.shape[0], volume.spec.dtype)
    made = mean.with_name(f".{mean.name}.restoring.zarr")
    output = reconstruct(replace(request, out=str(made), voxel_size=volume.spec.voxel_size, overwrite=True), notify)
    for channel, path in enumerate((mean, uncertainty)):
        part = open_volume(made, channel=channel)
        if format == PNG:
            write_png(path, part.read(Box.of(part.spec.shape)))
        else:
            assert format is not None
            export(part, path, format, overwrite=request.overwrite)
    result = Restored(mean, uncertainty, Codes(volume.spec.dtype).step, reliability(output))
    shutil.rmtree(made)
    return result


def _open(request: Request) -> Volume:
    opened = partial(open_volume, request.input, level=request.level, channel=request.channel)
    try:
        return opened(voxel_size=request.voxel_size)
    except InputError:
        if request.voxel_size is not None:
            raise
        return opened(voxel_size=NO_SIZE)
