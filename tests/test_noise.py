"""Keyed noise is a pure function of position, and is noise."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.reconstruct.noise import NoiseField, normal_table

WHOLE = Box((-4, -20, -20), (12, 60, 44))
FIELD = NoiseField(7)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_a_voxel_has_the_same_noise_in_every_box(data: st.DataObject) -> None:
    start = tuple(data.draw(st.integers(a, b - 1)) for a, b in zip(WHOLE.start, WHOLE.stop, strict=True))
    stop = tuple(data.draw(st.integers(a + 1, b)) for a, b in zip(start, WHOLE.stop, strict=True))
    part = Box(start, stop)
    whole = FIELD.normal(1, 2, WHOLE, channels=2)
    assert (FIELD.normal(1, 2, part, channels=2) == whole[(slice(None), *part.slices(WHOLE.start))]).all()


def test_noise_is_standard_normal() -> None:
    noise = FIELD.normal(0, 0, Box((0, 0, 0), (20, 200, 200)), channels=4)
    n = noise.size
    assert abs(noise.mean()) < 4 / np.sqrt(n)
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / n) + 1e-4
    assert abs((noise**4).mean() - 3) < 4 * np.sqrt(96 / n) + 1e-2


def test_noise_is_independent_across_neighbours_channels_members_steps_and_seeds() -> None:
    box = Box((0, 0, 0), (20, 200, 200))
    noise = FIELD.normal(0, 0, box, channels=2)
    others = [
        FIELD.normal(1, 0, box)[0],
        FIELD.normal(0, 1, box)[0],
        NoiseField(8).normal(0, 0, box)[0],
        noise[1],
        *(np.roll(noise[0], 1, axis) for axis in range(3)),
        np.roll(noise[0], (1, 1), (1, 2)),
        np.roll(noise[0], 4, 2),
    ]
    for other in others:
        assert abs((noise[0] * other).mean()) < 4.5 / np.sqrt(noise[0].size)


def test_member_and_step_do_not_trade_places() -> None:
    box = Box((0, 0, 0), (1, 8, 8))
    assert (FIELD.normal(1, 2, box) != FIELD.normal(2, 1, box)).any()
    assert (FIELD.normal(0, 3, box) != FIELD.normal(3, 0, box)).any()


def test_noise_is_the_same_on_every_machine() -> None:
    # Golden: made by this very expression; only integers are hashed and a table of quantiles is looked up, whose
    # entries are rounded here so that another C library's last digit does not matter.
    noise = NoiseField(0).normal(3, 1, Box((-2, 5, 100), (2, 9, 104)), channels=2)
    digest = hashlib.sha256(np.rint(noise * 1000).astype("<i4").tobytes()).hexdigest()
    assert digest[:16] == "d93e7476c9fb6e66"


def test_noise_is_the_same_wherever_it_is_computed() -> None:
    """The way of GPUs, here on a CPU: only integers, so the bits do not depend on the device."""
    for seed, member, step in ((0, 0, 0), (2**64 - 1, 3, 7)):
        there = NoiseField(seed)._hashed_on("cpu", member, step, WHOLE, 4)
        assert (there.numpy() == NoiseField(seed).normal(member, step, WHOLE, 4)).all()
        assert (NoiseField(seed).normal_on("cpu", member, step, WHOLE, 4) == there).all()


def test_table_is_symmetric_and_of_unit_variance() -> None:
    table = normal_table()
    assert np.allclose(table, -table[::-1])
    assert abs((table.astype(float) ** 2).mean() - 1) < 1e-4
