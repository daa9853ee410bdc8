"""A procedural volume that looks like neural tissue in the electron microscope, of any size, from nothing.

Convention: positions in nm, z y x, voxel (0, 0, 0) at the origin. The grey of a voxel is a pure function of (seed,
position): any box gives the voxels that a larger box has in its place, and a stack with 40 nm sections *is* every
fifth plane of the 8 nm volume, as a voxel is the grey at a point. Nothing is drawn from a generator; noise comes from
integer hashes of positions, which are rounded to 1/1024 nm so that one place has one key whatever the voxel size.

    seeds      one per lattice cell of 240 nm, jittered; a power diagram of them, in coordinates bent by smooth noise
    neurites   all seeds near one random rod, or one seed alone; a membrane lies where two neurites meet
    organelles mitochondria around some seeds, vesicles in some neurites, reticulum at zero crossings of noise

Only + - * / sqrt and comparisons are used, element by element, so results do not depend on how arrays are cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box, Triple, cell_box, cells_meeting
from emdiffuse_vol.geometry.hashing import Words, mix
from emdiffuse_vol.stores.random_fields import (
    Axes,
    Doubles,
    Floats,
    Integers,
    key_of,
    lattice_hash,
    shot,
    smooth,
    uniform,
    words,
)
from emdiffuse_vol.stores.spec import digest_of, make_spec
from emdiffuse_vol.stores.volume import Nanometres, VolumeSpec

PATCH: Triple = (32, 64, 64)  # voxels painted at once: what fits the cache
BRICK = 200.0  # nm; its voxels share a list of seeds
CELL = 240.0  # nm, lattice of seeds
FAR = 37.0  # nm from the membrane, where it no longer matters
WIDEST = 560.0  # nm, limit on the distance of two seeds that a membrane separates
ROD_CELL, ROD_HALF = 1100.0, 800.0  # nm, lattice and half length of the rods that make long neurites
BEND = 85.0  # nm, about the largest displacement of a membrane by smooth noise
REACH = 2  # lattice cells on either side whose seeds can matter to a brick
MEMBRANE = 11.0  # nm, half width at the base
SCHEME = 1  # of the identity; changes with any change of the greys


def phantom(box: Box, voxel_size: Nanometres, seed: int = 0) -> NDArray[np.uint8]:
    """Greys [z, y, x] of any box, also at negative positions. About a million voxels a second on one core."""
    result = np.empty(box.shape, np.uint8)
    for index in () if box.empty else cells_meeting(box, PATCH):
        patch = cell_box(index, PATCH) & box
        z, y, x = (_positions(a, b, v) for a, b, v in zip(patch.start, patch.stop, voxel_size, strict=True))
        result[patch.slices(box.start)] = _paint((z, y, x), seed)
    return result


@dataclass(frozen=True)
class _Tissue:
    """Facts of each seed on a block of lattice cells [z, y, x]; ``start`` is the first cell."""

    start: Integers
    place: Doubles  # [3, z, y, x] nm
    weight: Doubles  # nm^2, of the power diagram
    neurite: Words  # all seeds of one neurite share it
    direction: Doubles  # [3, z, y, x] of the neurite, unit
    mitochondrion: Doubles  # half length in nm, 0 where there is none

    @staticmethod
    def around(low: Doubles, high: Doubles, seed: int) -> _Tissue:
        """All seeds that can matter between two corners, in nm."""
        start, stop = _window(low, high)
        lattice = [np.arange(a, b) for a, b in zip(start, stop, strict=True)]
        jitter = [uniform(lattice_hash(seed, salt, *lattice)) for salt in range(3)]
        corner = np.meshgrid(*lattice, indexing="ij")
        place = np.stack([(c + j) * CELL for c, j in zip(corner, jitter, strict=True)])
        neurite, direction = _neurites(place, lattice_hash(seed, 3, *lattice), seed)
        chance = uniform(lattice_hash(seed, 4, *lattice))
        mitochondrion = np.where(chance < 0.13, 150 + 1500 * chance, 0.0)
        weight = 24000 * uniform(lattice_hash(seed, 5, *lattice))
        return _Tissue(start, place, weight, neurite, direction, mitochondrion)

    def near(self, corner: Doubles, points: Floats) -> _Tissue:
        """The seeds that matter to ``points`` [3, n] of a brick; flat, and both in nm from the brick's corner."""
        start, stop = (edge - self.start for edge in _window(corner, corner + BRICK))
        window: Any = (..., *(slice(a, b) for a, b in zip(start, stop, strict=True)))
        place = self.place[window].reshape(3, -1) - corner[:, None]
        weight, mitochondrion = self.weight[window].ravel(), self.mitochondrion[window].ravel()
        low, high = (f(points, axis=1, keepdims=True) - place for f in (np.min, np.max))
        nearest = (np.maximum(np.maximum(low, -high), 0) ** 2).sum(0)
        farthest = ((np.maximum(-low, high) ** 2).sum(0) - weight).min()
        # The bisector of seeds i and j is (Dj - Di) / (2 |si - sj|) away, D being |p - s|^2 - w.
        limit = farthest + 2 * FAR * WIDEST + 100
        keep = (nearest - weight < limit) | (nearest < mitochondrion**2)
        neurite, direction = self.neurite[window].ravel(), self.direction[window].reshape(3, -1)
        return _Tissue(self.start, place[:, keep], weight[keep], neurite[keep], direction[:, keep], mitochondrion[keep])


def _window(low: Doubles, high: Doubles) -> tuple[Integers, Integers]:
    """Half-open range of lattice cells whose seeds can matter to the space between two corners."""
    return np.floor(low / CELL).astype(np.int64) - REACH, np.ceil(high / CELL).astype(np.int64) + REACH


def _neurites(place: Doubles, own: Words, seed: int) -> tuple[Words, Doubles]:
    """The rod of which a seed at ``place`` [3, ...] lies within the radius, or its own key; and its direction."""
    home = np.floor(place / ROD_CELL).astype(np.int64)
    depth, neurite = np.zeros(own.shape), own
    direction = _unit(np.stack([uniform(mix(own + np.uint64(k))) for k in range(3)]))
    for offset in product((-1, 0, 1), repeat=3):
        rod = home + np.reshape(offset, (3, *[1] * own.ndim))
        key = mix(mix(mix(key_of(seed, 6) + words(rod[0])) + words(rod[1])) + words(rod[2]))
        numbers = [uniform(mix(key + np.uint64(k))) for k in range(7)]
        along = _unit(np.stack(numbers[3:6]))
        away = place - (rod + np.stack(numbers[:3])) * ROD_CELL
        t = np.clip((away * along).sum(0), -ROD_HALF, ROD_HALF)
        inside = 130 + 420 * numbers[6] - np.sqrt(((away - t * along) ** 2).sum(0))
        better = inside > depth
        depth, neurite = np.where(better, inside, depth), np.where(better, key, neurite)
        direction = np.where(better, along, direction)
    return neurite, direction


def _paint(axes: Axes, seed: int) -> NDArray[np.uint8]:
    """Greys of the voxels at ``axes``."""
    fine, coarse = smooth(seed, 20, axes, 26), smooth(seed, 21, axes, 75)
    cytoplasm, loaded, distance, depth, along = _cells(axes, seed)
    grey = cytoplasm + 9 * fine + 9 * coarse

    reticulum = np.abs(smooth(seed, 22, axes, 150)) * 70 + 40 * np.maximum(0, 0.45 - smooth(seed, 23, axes, 400))
    grey -= 45 * _bump(reticulum, 9) * (distance > 25)
    if loaded.any():
        cluster = np.clip(4 * smooth(seed, 24, axes, 330) + 0.5, 0, 1)
        grey -= cluster * loaded * (distance > 24) * _vesicles(axes, seed)

    stripe = np.abs((along + 22 * coarse) / 46 % 1 - 0.5)  # a triangle wave: cristae
    matrix = 86 + 90 * (stripe - 0.25) * np.clip((depth - 12) / 8, 0, 1) - 26 * _bump(depth - 5, 7) + 5 * fine
    grey += (matrix - grey) * np.clip(depth / 5, 0, 1)

    dense = np.clip(5 * smooth(seed, 25, axes, 300) - 5.5, 0, 1)  # patches of thick dark membrane: synapses
    grey += (62 + 14 * coarse - 18 * dense - grey) * (0.95 * _bump(distance, MEMBRANE + 22 * dense))
    grey += 11 * shot(axes, seed)
    return np.rint(np.clip(grey, 0, 255)).astype(np.uint8)


def _cells(axes: Axes, seed: int) -> Floats:
    """-> [5, z, y, x]: grey of the cytoplasm, 1 where vesicles may be, nm to the membrane, nm below the surface of a
    mitochondrion, nm along its axis."""
    bend = [75 * smooth(seed, 10 + k, axes, 420) + 21 * smooth(seed, 13 + k, axes, 120) for k in range(3)]
    bricks = [np.floor(p / BRICK).astype(np.int64) for p in axes]
    first, last = (np.array([b[i] for b in bricks]) * BRICK for i in (0, -1))
    tissue = _Tissue.around(first, last + BRICK, seed)
    result = np.empty((5, *bend[0].shape), np.float32)
    for runs in product(*map(_runs, bricks)):
        place, corner = tuple(run for _, run in runs), np.array([b * BRICK for b, _ in runs])
        # Relative to the brick, so that float32 suffices and rounding does not depend on the box asked for.
        local = np.ix_(*((p[run] - c).astype(np.float32) for p, c, run in zip(axes, corner, place, strict=True)))
        bent = [a + np.clip(w[place], -BEND, BEND) for a, w in zip(local, bend, strict=True)]
        points = np.stack([b.ravel() for b in bent])
        near = tissue.near(corner, points)
        owner, distance = _diagram(near, points)
        depth, along = _mitochondria(near, points, owner, distance)
        grey = _cytoplasm(near.neurite)[owner]
        loaded = (uniform(mix(near.neurite + np.uint64(1))) < 0.45)[owner]
        for k, values in enumerate((grey, loaded, distance, depth, along)):
            result[k][place] = values.reshape(bent[0].shape)
    return result


def _diagram(near: _Tissue, points: Floats) -> tuple[NDArray[np.intp], Floats]:
    """points: [3, n] -> (nearest seed, nm to its bisector with the nearest seed of another neurite).

    With |p - s|^2 - w = |p|^2 - 2 (p.s - (|s|^2 - w) / 2), the nearest seed has the largest p.s - (|s|^2 - w) / 2.
    """
    place = near.place.astype(np.float32)
    score = points[0][:, None] * place[0]
    score += points[1][:, None] * place[1]
    score += points[2][:, None] * place[2]
    score -= (((near.place**2).sum(0) - near.weight) / 2).astype(np.float32)
    rows = np.arange(len(score))
    one = score.argmax(1)
    best = score[rows, one]
    # A penalty, large against any score, for the seeds of the same neurite.
    score += np.where(near.neurite[:, None] == near.neurite, np.float32(-1e9), np.float32(0))[one]
    two = score.argmax(1)
    apart = np.sqrt(((near.place[:, :, None] - near.place[:, None]) ** 2).sum(0)).clip(1, WIDEST).astype(np.float32)
    return one, np.minimum((best - score[rows, two]) / apart[one, two], np.float32(FAR))


def _mitochondria(near: _Tissue, points: Floats, owner: NDArray[np.intp], distance: Floats) -> tuple[Floats, Floats]:
    """Ellipsoids around seeds, inside their neurite -> (nm below the surface, nm along the axis), [n]."""
    chosen = np.flatnonzero(near.mitochondrion)
    length = near.mitochondrion[chosen].astype(np.float32)
    if not chosen.size:
        return np.full_like(distance, -1), np.zeros_like(distance)
    width = 70 + length / 8
    away = [p[:, None] - s for p, s in zip(points, near.place[:, chosen].astype(np.float32), strict=True)]
    axis = near.direction[:, chosen].astype(np.float32)
    along = away[0] * axis[0] + away[1] * axis[1] + away[2] * axis[2]
    across = away[0] * away[0] + away[1] * away[1] + away[2] * away[2] - along * along
    depth = width * (1 - np.sqrt((along / length) ** 2 + np.maximum(across, 0) / width**2))
    depth[near.neurite[owner][:, None] != near.neurite[chosen]] = -1
    rows, deepest = np.arange(len(depth)), depth.argmax(1)
    return np.minimum(depth[rows, deepest], distance - 17), along[rows, deepest]


def _vesicles(axes: Axes, seed: int, spacing: float = 56.0) -> Floats:
    """How much darker each voxel is: rings of about 40 nm, one or none in each cell of a lattice whose columns along z
    are shifted at random, lest there be planes of vesicles."""
    (z, y, x), (_, iy, ix) = axes, (np.floor(p / spacing).astype(np.int64) for p in axes)
    rows, columns = np.arange(iy[0], iy[-1] + 1), np.arange(ix[0], ix[-1] + 1)
    key = lattice_hash(seed, 30, np.zeros(1, np.int64), rows, columns)
    u = z[:, None, None] / spacing + uniform(key)
    key = mix(key + words(np.floor(u).astype(np.int64)))  # [z, rows, columns], one for each vesicle
    dz, dy, dx = (18 * uniform(mix(key + np.uint64(k))) - 9 for k in range(3))
    there = np.ix_(np.arange(len(z)), iy - iy[0], ix - ix[0])
    square = (((u % 1 - 0.5) * spacing - dz) ** 2).astype(np.float32)[there]
    square += ((y - (iy + 0.5) * spacing).astype(np.float32)[:, None] - dy.astype(np.float32)[there]) ** 2
    square += ((x - (ix + 0.5) * spacing).astype(np.float32) - dx.astype(np.float32)[there]) ** 2
    dark = np.where(uniform(key) < 0.75, 50, 0).astype(np.float32)
    return dark[there] * _bump(np.sqrt(square) - 14, 9)


def _cytoplasm(neurite: Words) -> Floats:
    """Grey of each neurite: most are light, some dark."""
    u = uniform(neurite)
    return np.where(u < 0.14, 88 + 100 * u, 130 + 40 * u).astype(np.float32)


def _bump(distance: Floats, width: float | Floats) -> Floats:
    """1 at 0, falling smoothly to 0 at +-width."""
    rest = np.maximum(0, 1 - (distance / width) ** 2)
    return rest * rest


def _positions(start: int, stop: int, step: float) -> Doubles:
    return np.rint(np.arange(start, stop) * step * 1024) / 1024


def _runs(cells: Integers) -> Iterator[tuple[int, slice]]:
    """Runs of equal numbers in a sorted array."""
    cuts = [0, *(np.flatnonzero(np.diff(cells)) + 1).tolist(), len(cells)]
    return ((int(cells[a]), slice(a, b)) for a, b in pairwise(cuts))


def _unit(numbers: Doubles) -> Doubles:
    """Numbers in [0, 1), [3, ...] -> a direction."""
    centred: Doubles = numbers - 0.5
    return centred / np.asarray(np.sqrt((centred**2).sum(0) + 1e-9), np.float64)


@dataclass(frozen=True)
class PhantomVolume:
    """The phantom as a volume; its url says all there is to know: ``phantom:40x512x512?voxel_size=40,8,8&seed=0``."""

    spec: VolumeSpec
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def url(self) -> str:
        shape, size = "x".join(map(str, self.spec.shape)), ",".join(f"{v:.12g}" for v in self.spec.voxel_size)
        return f"phantom:{shape}?voxel_size={size}&seed={self.seed}"

    def read(self, box: Box) -> NDArray[Any]:
        assert box in Box.of(self.spec.shape), f"box {box} is not inside shape {self.spec.shape}"
        return phantom(box, self.spec.voxel_size, self.seed)

    @staticmethod
    def of(shape: Triple, voxel_size: Nanometres, seed: int = 0) -> PhantomVolume:
        """Raises InputError for a shape or a voxel size that is not positive."""
        spec = make_spec(
            "the phantom",
            shape=shape,
            dtype="uint8",
            voxel_size=voxel_size,
            format="phantom",
            digest=digest_of([SCHEME, seed]),
        )
        return PhantomVolume(spec, seed)

    @staticmethod
    def from_url(url: str) -> PhantomVolume:
        """Raises InputError."""
        shape, _, query = url.removeprefix("phantom:").partition("?")
        try:
            fields = dict(parse_qsl(query, strict_parsing=True)) if query else {}
            z, y, x = (int(n) for n in shape.split("x"))
            dz, dy, dx = (float(v) for v in fields.pop("voxel_size", "8,8,8").split(","))
            seed = int(fields.pop("seed", "0"))
            if fields:
                raise ValueError(f"unknown {', '.join(fields)}")
        except ValueError as error:
            raise InputError(
                f"{url} is not a phantom ({error}); expected such as phantom:40x512x512?voxel_size=40,8,8&seed=0"
            ) from error
        return PhantomVolume.of((z, y, x), (dz, dy, dx), seed)
