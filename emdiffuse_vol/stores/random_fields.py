"""Random numbers that are pure functions of position, for the phantom.

Convention: axes z, y, x, each a vector of positions in nm, on the lattice of 1/1024 nm where they are keys; fields are
float32 [z, y, x]. Nothing is drawn from a generator: every number is an integer hash of (seed, salt, position), so a
field is the same wherever a box begins. ``salt`` tells fields of one seed apart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.hashing import Words, mix

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Axes = tuple[Doubles, Doubles, Doubles]


def shot(axes: Axes, seed: int) -> Floats:
    """Noise of variance 1, independent in every voxel: the sum of four uniform numbers is nearly normal."""
    lanes = lattice_hash(seed, 40, *(np.rint(p * 1024).astype(np.int64) for p in axes))
    total = sum((lanes >> np.uint64(16 * k) & np.uint64(0xFFFF)).astype(np.float32) for k in range(4))
    return (np.asarray(total, np.float32) - 131070) * np.float32(3**0.5 / 65536)


def smooth(seed: int, salt: int, axes: Axes, spacing: float) -> Floats:
    """Random numbers on a lattice through a cubic B-spline: about -2 to 2, standard deviation about 0.6."""
    taps, lattice = [], []
    for p in axes:
        i = np.floor(p / spacing).astype(np.int64)
        t = (p / spacing - i).astype(np.float32)
        tt, ttt = t * t, t * t * t
        weights = (1 - 3 * t + 3 * tt - ttt, 4 - 6 * tt + 3 * ttt, 1 + 3 * t + 3 * tt - 3 * ttt, ttt)
        taps.append([(i - i[0] + k, w / 6) for k, w in enumerate(weights)])
        lattice.append(np.arange(i[0] - 1, i[-1] + 3))
    values = (6 * uniform(lattice_hash(seed, salt, *lattice)) - 3).astype(np.float32)
    for axis in (2, 1, 0):  # z last: whole planes are then copied
        shape = [1, 1, 1]
        shape[axis] = -1
        terms = [values.take(i, axis) * w.reshape(shape) for i, w in taps[axis]]
        values = terms[0] + terms[1] + terms[2] + terms[3]
    return values


def lattice_hash(seed: int, salt: int, z: Integers, y: Integers, x: Integers) -> Words:
    """64 random bits for each point of a grid."""
    planes = mix(key_of(seed, salt) + words(z))
    rows = mix(planes[:, None] + words(y))
    return mix(rows[:, :, None] + words(x))


def key_of(seed: int, salt: int) -> Words:
    return mix(mix(np.array([seed % 2**64], np.uint64)) + np.uint64(salt))


def words(index: Integers) -> Words:
    return index.astype(np.int64).view(np.uint64)


def uniform(words: Words) -> Doubles:
    """In [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
