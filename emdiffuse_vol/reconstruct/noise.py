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
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.geometry.hashing import FACTORS, INCREMENT, LAST_SHIFT, mix, mix_in_place

if TYPE_CHECKING:
    from torch import Tensor

CHANNELS = 4  # 16-bit lanes of one 64-bit hash


@dataclass(frozen=True)
class NoiseField:
    seed: int

    def normal(self, member: int, step: int, box: Box, channels: int = 1) -> NDArray[np.float32]:
        """-> float32 [channels, z, y, x], independent N(0, 1) numbers."""
        assert 1 <= channels <= CHANNELS
        table, key = normal_table(), self._key(member, step)
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

    def normal_on(self, device: str, member: int, step: int, box: Box, channels: int = 1) -> Tensor:
        """The same numbers as a tensor, computed on the device where that is no CPU: nothing has to travel there."""
        import torch

        if device == "cpu":
            return torch.from_numpy(self.normal(member, step, box, channels))
        return self._hashed_on(device, member, step, box, channels)

    def _hashed_on(self, device: str, member: int, step: int, box: Box, channels: int) -> Tensor:
        """As ``normal``, in the signed integers that torch has: sums and products wrap to the same bits."""
        import torch

        z, y, x = (torch.arange(a, b, device=device) for a, b in zip(box.start, box.stop, strict=True))
        planes = _mix_signed(z + _signed(self._key(member, step)))
        rows = _mix_signed(_mix_signed(y + (1 << 40)))
        columns = _mix_signed(_mix_signed(x + (1 << 41)) + 1)
        bits = _mix_signed((rows[:, None] + columns) ^ planes[:, None, None])
        table = _table_on(device)
        return torch.stack([table[(bits >> 16 * channel) & 0xFFFF] for channel in range(channels)])

    def _key(self, member: int, step: int) -> int:
        key = int(mix(np.array([self.seed], np.uint64))[0])
        for word in (member, step):
            key = int(mix(np.array([(key + word) % 2**64], np.uint64))[0])
        return key


def _mix_signed(x: Tensor) -> Tensor:
    """``hashing.mix`` of int64, overwriting its argument. A shift to the right brings in the sign: it is masked off."""
    x += _signed(INCREMENT)
    for shift, factor in FACTORS:
        x ^= (x >> shift) & ((1 << 64 - shift) - 1)
        x *= _signed(factor)
    x ^= (x >> LAST_SHIFT) & ((1 << 64 - LAST_SHIFT) - 1)
    return x


def _signed(word: int) -> int:
    """The signed number of the same 64 bits."""
    return word - 2**64 if word >= 2**63 else word


@cache
def _table_on(device: str) -> Tensor:
    import torch

    return torch.as_tensor(normal_table(), device=device)


@cache
def normal_table() -> NDArray[np.float32]:
    """Quantiles of the normal distribution at 65,536 equally likely points: +-4.2 at the ends, variance 0.99997."""
    quantile = NormalDist().inv_cdf
    return np.array([quantile((i + 0.5) / 65536) for i in range(65536)], np.float32)
