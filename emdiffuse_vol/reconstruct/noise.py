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
from emdiffuse_vol.geometry.hashing import mix, mix_in_place

CHANNELS = 4  # 16-bit lanes of one 64-bit hash


@dataclass(frozen=True)
class NoiseField:
    seed: int

    def normal(self, member: int, step: int, box: Box, channels: int = 1) -> NDArray[np.float32]:
        """-> float32 [channels, z, y, x], independent N(0, 1) numbers."""
        assert 1 <= channels <= CHANNELS
        table = normal_table()
        key = int(mix(np.array([self.seed], np.uint64))[0])
        for word in (member, step):
            key = int(mix(np.array([(key + word) % 2**64], np.uint64))[0])
        z, y, x = (np.arange(a, b).astype(np.uint64) for a, b in zip(box.start, box.stop, strict=True))
        planes = mix(z + np.uint64(key))
        rows = mix(mix(y + np.uint64(1 << 40)))
        columns = mix(mix(x + np.uint64(1 << 41)) + np.uint64(1))
        sites = rows[:, None] + columns
        result = np.empty((channels, *box.shape), np.float32)
        scratch = np.empty_like(sites)
        for k, plane in enumerate(planes):  # plane by plane: the hash stays in the cache
            bits = mix_in_place(np.bitwise_xor(sites, plane, out=scratch))
            lanes = bits.view(np.uint16).reshape(*sites.shape, CHANNELS)
            for channel in range(channels):
                np.take(table, lanes[..., channel], out=result[channel, k])
        return result


@cache
def normal_table() -> NDArray[np.float32]:
    """Quantiles of the normal distribution at 65,536 equally likely points: +-4.2 at the ends, variance 0.99997."""
    quantile = NormalDist().inv_cdf
    return np.array([quantile((i + 0.5) / 65536) for i in range(65536)], np.float32)
