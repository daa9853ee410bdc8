"""Integers mixed to random-looking bits: what noise keyed by position is made of.

Convention: uint64 arrays; arithmetic wraps. The same bits on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

# The finaliser of splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195).
INCREMENT = 0x9E3779B97F4A7C15
FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # each after a shift
LAST_SHIFT = 31


def mix(x: Words) -> Words:
    """A bijection."""
    return mix_in_place(x.copy())


def mix_in_place(x: Words) -> Words:
    """The same, overwriting its argument: no memory is touched twice."""
    x += np.uint64(INCREMENT)
    for shift, factor in FACTORS:
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(LAST_SHIFT)
    return x
