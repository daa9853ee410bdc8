"""Keyed noise: standard normal numbers that are a pure function of (seed, member, step, global voxel position).

Convention: a box in the output grid -> float32 [channel, z, y, x]; positions may be negative. Nothing is drawn,
nothing is remembered: any process can compute the noise of any voxel, so tiles agree where they overlap and a resumed
run agrees with an unbroken one. The numbers come from integer hashing and a table, with no floating-point arithmetic,
so they are the same bits on every machine and device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Box

Words = NDArray[np.uint64]
CHANNELS = 4  # 16-bit lanes of one 64-bit hash


@dataclass(frozen=True)
class NoiseField:
    seed: int

    def normal(self, member: int, step: int, box: Box, channels: int = 1) -> NDArray[np.float32]:
        """-> float32 [channels, z, y, x], independent N(0, 1) numbers."""
        assert 1 <= channels <= CHANNELS
        table = normal_table()
        key = int(_mix(np.array([self.seed], np.uint64))[0])
        for word in (member, step):
            key = int(_mix(np.array([(key + word) % 2**64], np.uint64))[0])
        z, y, x = (np.arange(a, b).astype(np.uint64) for a, b in zip(box.start, box.stop, strict=True))
        planes = _mix(z + np.uint64(key))
        rows = _mix(_mix(y + np.uint64(1 << 40)))
        columns = _mix(_mix(x + np.uint64(1 << 41)) + np.uint64(1))
        sites = rows[:, None] + columns
        result = np.empty((channels, *box.shape), np.float32)
        scratch = np.empty_like(sites)
        for k, plane in enumerate(planes):  # plane by plane: the hash stays in the cache
            lanes = _mix(np.bitwise_xor(sites, plane, out=scratch)).view(np.uint16).reshape(*sites.shape, CHANNELS)
            for channel in range(channels):
                np.take(table, lanes[..., channel], out=result[channel, k])
        return result


@cache
def normal_table() -> NDArray[np.float32]:
    """Quantiles of the normal distribution at 65,536 equally likely points: +-4.2 at the ends, variance 0.99997."""
    quantile = NormalDist().inv_cdf
    return np.array([quantile((i + 0.5) / 65536) for i in range(65536)], np.float32)


def _mix(x: Words) -> Words:
    """The finaliser of splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195), in place; a bijection."""
    x += np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x
