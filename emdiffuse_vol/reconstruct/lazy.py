"""The same blocks for xarray users: a lazy, dask-backed reconstruction of a ``DataArray``.

Convention: the array has dims z, y, x (any order); its voxel size is given, or read from evenly spaced coordinates in
nm. The result has coordinates in nm, ``mean`` in the input's dtype and ``uncertainty`` in float32 greys: the voxels
that ``emdvol reconstruct`` writes. Only a sparse sample of greys is computed at call time; with damaged="detect", of
every section.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.reconstruct.greys import Codes
from emdiffuse_vol.reconstruct.job import Job, Request
from emdiffuse_vol.reconstruct.run import prepare_volume
from emdiffuse_vol.reconstruct.worker import context_for
from emdiffuse_vol.stores.volume import DTYPES, VolumeSpec, mirror_into, mirror_source

if TYPE_CHECKING:
    import xarray as xr

AXES = ("z", "y", "x")


@dataclass(frozen=True)
class ArrayVolume:
    """An array in memory, or lazily computed by dask, as a ``Volume``."""

    data: Any
    spec: VolumeSpec
    url: str = "array"

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def read(self, box: Box) -> Any:
        return np.asarray(self.data[box.slices()])


def isotropic(
    image: xr.DataArray,
    *,
    voxel_size: tuple[float, float, float] | None = None,
    factor: str | float | None = None,
    mode: str = "vEMDiffuse-a",
    weights: str | None = None,
    members: int = 4,
    seed: int = 0,
    block: Triple | None = None,
    **settings: Any,
) -> xr.Dataset:
    """Reconstruct ``image`` (dims z, y, x) at isotropic spacing, lazily.

    voxel_size: z, y, x in nm. The other settings are those of ``reconstruct.job.Request``.
    Returns a Dataset with ``mean`` (the input's dtype) and ``uncertainty`` (float32, calibrated, in greys),
    dask-backed, one task per block. Raises the errors of ``emdiffuse_vol.errors``.
    """
    import dask.array as da
    import xarray as xr
    from dask.delayed import delayed

    volume = array_volume(image, voxel_size)
    request = Request(
        input=volume.url,
        out="",
        mode=mode,
        weights=weights,
        factor=factor,
        members=members,
        seed=seed,
        block=block,
        **settings,
    )
    prepared = prepare_volume(request, volume)
    plan = prepared.plan
    task = delayed(BlockOfArray(prepared.job), pure=False)
    grid, data = np.empty(plan.grid, object), da.asarray(volume.data)
    if prepared.job.damaged:
        data = data[plan.mode.axial.good]
    for index in range(len(plan)):
        part = plan[index]
        source = mirror_source(part.read, plan.mode.stack_shape)
        greys = data[source.slices()].rechunk(-1).to_delayed().item()
        codes = da.from_delayed(task(index, greys), (2, *part.write.shape), volume.spec.dtype)
        grid[np.unravel_index(index, plan.grid)] = codes
    both = da.block(grid.tolist())
    spacing, origin = prepared.voxel_size, prepared.origin
    coords = {
        name: (name, o + np.arange(n) * s, {"units": "nm"})
        for name, o, n, s in zip(AXES, origin, plan.region.shape, spacing, strict=True)
    }
    step = np.float32(Codes(volume.spec.dtype).step)
    return xr.Dataset(
        {"mean": (AXES, both[0]), "uncertainty": (AXES, both[1].astype(np.float32) * step, {"units": "greys"})},
        coords=coords,
        attrs={"emdvol": prepared.job.fingerprint()},
    )


def array_volume(image: xr.DataArray, voxel_size: tuple[float, float, float] | None) -> ArrayVolume:
    """Raises InputError for missing axes, an unsupported dtype, or no voxel size."""
    if set(image.dims) != set(AXES):
        raise InputError(f"the array has dims {tuple(image.dims)}, expected z, y and x; rename them")
    image = image.transpose(*AXES)
    if str(image.dtype) not in DTYPES:
        raise InputError(f"the array is {image.dtype}, expected one of {', '.join(DTYPES)}; convert it first")
    origin = tuple(float(image[axis][0]) if axis in image.coords else 0.0 for axis in AXES)
    if voxel_size is None:
        voxel_size = _spacing(image)
    if min(image.shape) < 1 or len(voxel_size) != 3 or not all(0 < v < float("inf") for v in voxel_size):
        raise InputError(f"voxel_size {voxel_size} of shape {image.shape}: expected three positive sizes z, y, x in nm")
    shape: Any = image.shape
    spec = VolumeSpec(shape, str(image.dtype), voxel_size, origin, identity={"array": [*shape, str(image.dtype)]})  # type: ignore[arg-type]
    return ArrayVolume(image.data, spec)


def _spacing(image: xr.DataArray) -> tuple[float, float, float]:
    sizes = []
    for axis in AXES:
        if axis not in image.coords or image.sizes[axis] < 2:
            raise InputError(f"the array has no coordinates along {axis}; give voxel_size=(z, y, x) in nm")
        steps = np.diff(image[axis].values.astype(float))
        if not np.allclose(steps, steps[0]) or steps[0] <= 0:
            raise InputError(f"coordinates along {axis} are not evenly rising; give voxel_size=(z, y, x) in nm")
        sizes.append(float(steps[0]))
    z, y, x = sizes
    return z, y, x


@dataclass(frozen=True)
class BlockOfArray:
    """A block computed from the part of the array it needs."""

    job: Job

    def __call__(self, index: int, greys: Any) -> Any:
        context = context_for(self.job)
        read, shape = context.plan[index].read, context.plan.mode.stack_shape
        return context.predict(index, mirror_into(greys, mirror_source(read, shape), read, shape))
