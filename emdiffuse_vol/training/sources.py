"""What a run trains on: stored volumes and registered pairs, as greys in memory.

Convention: a source is a part of a volume: its region of interest without what is held out. A source that is small
enough is held in memory whole; a larger one is seen through ``CUBES`` cubes that are read anew, one after the other,
somewhere else. Which cube is where at which step follows from (seed, step) alone. The held-out part is the end of the
x axis (pairs: of the rows): no voxel of it is read for training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import ConfigError, InputError
from emdiffuse_vol.geometry.boxes import Box, reflect
from emdiffuse_vol.metrics.interpolation import linear_at
from emdiffuse_vol.reconstruct.empty import Overlay
from emdiffuse_vol.reconstruct.greys import GreyMap, dtype_greys, measure_greys
from emdiffuse_vol.reconstruct.run import parse_roi
from emdiffuse_vol.reconstruct.source import resolve_damaged
from emdiffuse_vol.registration.warps import in_pixels
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.volume import Nanometres, Volume, VolumeSpec
from emdiffuse_vol.training.volumes import FloatArray, TrainingVolume, coarse_volume, isotropic_volume, lateral_volume

VOLUMES = ("vEMDiffuse-i", "vEMDiffuse-a")  # modes that learn what lies between sections
IN_MEMORY = 2**27  # voxels, 512 MB of float32
CUBES, CUBE = 4, (192, 192, 192)  # held at a time, of a larger source; voxels of the isotropic grid
RENEW = 400  # steps that a cube is used for
FRESH = 10  # places looked at for one that the mask allows
TRUSTED, LEAST_TRUSTED = 0.5, 0.25  # confidence of pixels that are learnt from, and the share of them that a pair needs

Refill = Callable[[TrainingVolume, int], TrainingVolume]


@dataclass(frozen=True)
class VolumeSource:
    """An entry of ``volumes`` in the configuration. Sizes are z, y, x in nm; roi is in its voxels. mask: a volume, 0
    where nothing is to be learnt; of another shape, it is placed in nm."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    path: str
    weight: float = 1.0
    voxel_size: Nanometres | None = None
    level: int = 0
    channel: int | None = None
    roi: str | None = None
    mask: str | None = None
    damaged: str | None = None


@dataclass(frozen=True)
class PairSource:
    """An entry of ``pairs``: two registered images or stacks. For EMDiffuse-r the target is finer by the factor. Where
    it is not given, it is found by its name, see ``partnered``."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    condition: str
    target: str | None = None
    weight: float = 1.0


@dataclass
class Source:
    """factor: None for an isotropic volume, else lateral pixels from section to section. refill: see ``Cubes``.
    coarse: None, or how many rows at least, where planes keep their coarse rows as the published network had them.
    axes: those that may play z."""

    volume: Volume
    region: Box
    greys: GreyMap
    factor: int | None
    mask: Overlay | None = None
    weight: float = 1.0
    coarse: int | None = None
    damaged: tuple[int, ...] = ()
    axes: tuple[int, ...] = (0, 1, 2)
    refill: Refill | None = field(default=None, repr=False)

    def read(self, box: Box) -> TrainingVolume:
        """box: voxels of the stored volume."""
        greys = self.greys.normalise(self.volume.read(box))
        inside = None if self.mask is None else inside_mask(self.mask, box)
        bad = [k - box.start[0] for k in self.damaged if box.start[0] <= k < box.stop[0]]
        if bad:
            greys = bridged(greys, bad)
            inside = np.ones(greys.shape, np.float32) if inside is None else inside
            inside[bad] = 0
        if self.coarse is not None:
            result = coarse_volume(greys, self.coarse)
            if inside is not None:
                inside = inside[reflect(np.arange(len(result.greys)), len(inside))]
        elif self.factor is not None:
            result = lateral_volume(greys, self.factor)
            if inside is not None:  # a plane between sections is never known, so its mask does not matter
                inside = np.repeat(inside, self.factor, axis=0)[: len(result.greys)]
        else:
            result = replace(isotropic_volume(greys), axes=self.axes)
        if inside is not None:
            result = replace(result, known=result.known * inside)
        if self.refill is not None and self.factor is not None:
            result = self.refill(result, self.factor)
        return result

    @property
    def small(self) -> bool:
        return prod(self.region.shape) * (self.factor or 1) <= IN_MEMORY

    @cached_property
    def whole(self) -> TrainingVolume:
        return self.read(self.region)

    def cube(self, rng: np.random.Generator) -> TrainingVolume:
        """Somewhere in the region, where the mask has tissue if that is found soon."""
        sides: tuple[int, ...] = (ceil(CUBE[0] / (self.factor or 1)) + 1, *CUBE[1:])
        if self.coarse is not None:  # every row is a section
            sides = tuple(max(n, self.coarse) for n in CUBE)
        shape = tuple(min(n, s) for n, s in zip(self.region.shape, sides, strict=True))
        for _ in range(FRESH):
            start = tuple(
                int(rng.integers(a, b - n + 1))
                for a, b, n in zip(self.region.start, self.region.stop, shape, strict=True)
            )
            box = Box(start, tuple(a + n for a, n in zip(start, shape, strict=True)))  # type: ignore[arg-type]
            if self.mask is None or inside_mask(self.mask, box).mean() > 0.1:
                break
        return self.read(box)


def bridged(sections: FloatArray, bad: list[int]) -> FloatArray:
    """Damaged sections replaced by what lies between their good neighbours. Raises InputError where none is good."""
    good = np.setdiff1d(np.arange(len(sections)), bad)
    if not good.size:
        raise InputError("all sections of a place to train on are damaged; leave it out with roi or mask")
    position = np.interp(np.arange(len(sections)), good, np.arange(len(good)))
    below = np.floor(position).astype(np.int64)
    return linear_at(sections[good], below, (position - below).astype(np.float32))


def inside_mask(mask: Overlay, box: Box) -> FloatArray:
    """1 for voxels of ``box`` whose centre lies where the mask is not 0, else 0; it is 0 outside itself, too."""
    found = np.zeros(box.shape, np.float32)
    places = [
        np.floor((np.arange(a, b) - offset) / step + 0.5).astype(int)
        for a, b, offset, step in zip(box.start, box.stop, mask.offset, mask.step, strict=True)
    ]
    there = [np.flatnonzero((p >= 0) & (p < n)) for p, n in zip(places, mask.volume.spec.shape, strict=True)]
    if all(t.size for t in there):
        z, y, x = (p[t] for p, t in zip(places, there, strict=True))
        part = Box((z[0], y[0], x[0]), (z[-1] + 1, y[-1] + 1, x[-1] + 1))
        found[np.ix_(*there)] = mask.volume.read(part)[np.ix_(z - z[0], y - y[0], x - x[0])] != 0
    return found


class Cubes:
    """The sources of a run, as volumes in memory."""

    def __init__(self, sources: list[Source], seed: int) -> None:
        self.sources, self.seed = sources, seed
        weights = np.array([source.weight for source in sources], float)
        self.chances = weights / weights.sum()
        self._held: dict[tuple[int, int], tuple[int, TrainingVolume]] = {}

    @property
    def lacking(self) -> bool:
        """Whether planes are unknown that a network could fill."""
        return any(source.factor is not None and source.coarse is None for source in self.sources)

    def choose(self, rng: np.random.Generator, step: int) -> TrainingVolume:
        number = int(rng.choice(len(self.sources), p=self.chances))
        source, place = self.sources[number], int(rng.integers(CUBES))
        if source.small:
            return source.whole
        # Places are renewed in turn, not all at once.
        age = (step + place * RENEW // CUBES) // RENEW
        if self._held.get((number, place), (-1,))[0] != age:
            cube = source.cube(np.random.default_rng((self.seed, number, place, age)))
            self._held[number, place] = (age, cube)
        return self._held[number, place][1]

    def set_refill(self, refill: Refill) -> None:
        """What fills the unknown planes of anisotropic stacks from now on; those in memory are filled again."""
        self._held.clear()
        for source in self.sources:
            source.refill = refill
            source.__dict__.pop("whole", None)


def open_source(entry: VolumeSource, mode: str, held_out: float, coarse: int | None = None) -> tuple[Source, Source]:
    """-> the part to train on and the part held out. Raises InputError and ConfigError.

    coarse: see :class:`Source`, for vEMDiffuse-a alone.
    """
    volume = open_volume(entry.path, voxel_size=entry.voxel_size, level=entry.level, channel=entry.channel)
    spec = volume.spec
    region = Box.of(spec.shape) if entry.roi is None else parse_roi(entry.roi)
    if region.empty or region not in Box.of(spec.shape):
        raise ConfigError(f"roi {entry.roi} is not inside {entry.path}, which is {Box.of(spec.shape)}")
    if not entry.weight > 0:
        raise ConfigError(f"weight of {entry.path} is {entry.weight}; it must be above 0")
    mask = None
    if entry.mask is not None:
        mask = _open_mask(entry.mask, spec)
    factor = _factor(entry.path, spec.voxel_size, mode) if mode in VOLUMES else None
    axes = (0,) if mode not in VOLUMES and not isotropic(spec.voxel_size) else (0, 1, 2)
    greys, _ = measure_greys(region.shape, lambda box: volume.read(box.shift(region.start)))
    train, held = split(region, held_out)
    rows = None if factor is None else coarse
    if rows is None and (planes := (region.shape[0] - 1) * (factor or 1) + 1) < 8:
        raise ConfigError(f"{entry.path} is {planes} planes of its lateral pixels deep; training needs at least 8")
    bad = resolve_damaged(entry.damaged, volume)
    parts = [Source(volume, part, greys, factor, mask, entry.weight, rows, bad, axes) for part in (train, held)]
    return parts[0], parts[1]


def split(region: Box, held_out: float) -> tuple[Box, Box]:
    """The end of the x axis, ``held_out`` of its length, is held out. Raises ConfigError."""
    _check_share(held_out, "the x axis")
    start, stop = region.start, region.stop
    cut = stop[2] - max(1, round(held_out * region.shape[2]))
    train, held = Box(start, (stop[0], stop[1], cut)), Box((start[0], start[1], cut), stop)
    if min(train.shape[1:]) < 8 or min(held.shape[1:]) < 8 or region.shape[0] < 3:
        raise ConfigError(f"{region} is too small to train on and to hold {held_out:g} out; at least 3 x 8 x 8 each")
    return train, held


def _open_mask(path: str, spec: VolumeSpec) -> Overlay:
    """Voxel upon voxel where it has the shape of its volume, else placed in nm, as ``emdvol reconstruct`` does."""
    mask = open_volume(path, voxel_size=spec.voxel_size)
    if mask.spec.shape == spec.shape:
        return Overlay(mask, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    return Overlay.of(open_volume(path), spec)


def _check_share(held_out: float, of: str) -> None:
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out is {held_out}; it must be a share between 0 and 1 of {of}")


def isotropic(voxel_size: Nanometres) -> bool:
    return max(voxel_size) <= 1.05 * min(voxel_size)


def _factor(path: str, voxel_size: Nanometres, mode: str) -> int | None:
    z, y, x = voxel_size
    if mode == "vEMDiffuse-i":
        if not isotropic(voxel_size):
            raise ConfigError(
                f"vEMDiffuse-i learns from isotropic volumes and {path} has voxels of {z:g} x {y:g} x {x:g} nm; "
                f"use mode vEMDiffuse-a, or correct its voxel_size"
            )
        return None
    factor = round(2 * z / (y + x))
    if factor < 2:
        raise ConfigError(
            f"vEMDiffuse-a learns from anisotropic stacks and {path} has voxels of {z:g} x {y:g} x {x:g} nm; "
            f"use mode vEMDiffuse-i, or correct its voxel_size"
        )
    return factor


def partnered(pairs: tuple[PairSource, ...]) -> list[PairSource]:
    """Every pair with its target: where none is given, that which is called ``slow`` where the condition is called
    ``fast``. A folder stands for everything in it that is called ``fast``. Raises ConfigError."""
    return [whole for entry in pairs for whole in ([entry] if entry.target is not None else _partners(entry))]


def _partners(entry: PairSource) -> list[PairSource]:
    def slow(fast: Path) -> Path:
        return fast.with_name(fast.name.replace("fast", "slow"))

    place = Path(entry.condition)
    fast = [path for path in (place, *sorted(place.glob("*fast*"))) if slow(path) != path and slow(path).exists()]
    if not fast:
        raise ConfigError(
            f"pair {entry.condition} has no target, and none is found by name; give the target, or name volumes as "
            f"1_fast.tif and 1_slow.tif, side by side"
        )
    return [PairSource(str(path), str(slow(path)), entry.weight) for path in fast]


@dataclass(frozen=True)
class Pair:
    """condition, target: [z, y, x], normalised by one grey map each; ``factor`` target pixels for one of the
    condition. trusted: which pixels of the condition are well registered, None for all."""

    condition: FloatArray
    target: FloatArray
    factor: int
    weight: float
    trusted: NDArray[np.bool_] | None = None

    def place(self, rng: np.random.Generator, side: int) -> tuple[int, int, int]:
        """Plane, top and left of a square patch of the condition, well registered if such a one is found soon."""
        depth, height, width = self.condition.shape
        found, most = (0, 0, 0), -1.0
        for _ in range(1 if self.trusted is None else FRESH):
            plane, top, left = (int(rng.integers(0, n)) for n in (depth, height - side + 1, width - side + 1))
            if self.trusted is None:
                return plane, top, left
            share = float(self.trusted[plane, top : top + side, left : left + side].mean())
            if share > most:
                found, most = (plane, top, left), share
            if share == 1:
                break
        return found


def trusted_pixels(path: str, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """Of a result of ``emdvol register`` with this shape, else None. Raises InputError where hardly any is."""
    if not (Path(path) / "confidence" / "zarr.json").is_file():
        return None
    volume = open_volume(Path(path) / "confidence")
    cells = volume.read(Box.of(volume.spec.shape)) >= TRUSTED * 255
    trusted = in_pixels(cells)[:, : shape[1], : shape[2]]
    if trusted.mean() < LEAST_TRUSTED:
        raise InputError(
            f"{path} was registered with a confidence of at least {TRUSTED} in {trusted.mean():.1%} of its pixels, "
            f"expected {LEAST_TRUSTED:.0%}; do not train on it"
        )
    return trusted


def open_pair(entry: PairSource, factor: int, held_out: float, measured: bool = False) -> tuple[Pair, Pair]:
    """-> the part to train on and the part held out, the last rows. measured: greys are normalised by the percentiles
    of the condition, not by the range of the dtype. Raises InputError and ConfigError."""
    _check_share(held_out, "the rows")
    if not entry.weight > 0:
        raise ConfigError(f"weight of {entry.condition} is {entry.weight}; it must be above 0")
    assert entry.target is not None
    images: list[FloatArray] = []
    greys = None
    for path in (entry.condition, entry.target):
        volume = open_volume(path, voxel_size=(1.0, 1.0, 1.0))
        if not measured:
            greys = dtype_greys(volume.spec.dtype)
        elif greys is None:
            greys, _ = measure_greys(volume.spec.shape, volume.read)
        images.append(greys.normalise(volume.read(Box.of(volume.spec.shape))))
    condition, target = images
    trusted = trusted_pixels(entry.condition, condition.shape)
    if trusted is not None:
        # What is trusted hardly anywhere along a border was not imaged twice; of the target, what is left over by the
        # factor goes, too.
        rows, columns = (_extent(trusted.mean(axis=axes)) for axes in ((0, 2), (0, 1)))
        condition, trusted = condition[:, rows, columns], trusted[:, rows, columns]
        fine_rows, fine_columns = (slice(s.start * factor, s.stop * factor) for s in (rows, columns))
        target = target[:, fine_rows, fine_columns]
    wanted: Any = (condition.shape[0], condition.shape[1] * factor, condition.shape[2] * factor)
    if target.shape != wanted:
        raise InputError(
            f"{entry.target} is {target.shape} and {entry.condition} is {condition.shape}; expected {wanted} at factor "
            f"{factor}; register the pair first"
        )
    cut = condition.shape[1] - max(1, round(held_out * condition.shape[1]))
    if min(cut, condition.shape[1] - cut, condition.shape[2]) < 8:
        raise ConfigError(
            f"{entry.condition} is {condition.shape}, too small to train on and to hold {held_out:g} of its "
            f"rows out; at least 8 rows and columns each"
        )
    above, below = (None, None) if trusted is None else (trusted[:, :cut], trusted[:, cut:])
    return (
        Pair(condition[:, :cut], target[:, : cut * factor], factor, entry.weight, above),
        Pair(condition[:, cut:], target[:, cut * factor :], factor, entry.weight, below),
    )


def _extent(shares: NDArray[np.float64]) -> slice:
    """From the first to the last that is at least half of the greatest."""
    found = np.flatnonzero(shares >= shares.max() / 2)
    return slice(int(found[0]), int(found[-1]) + 1)
