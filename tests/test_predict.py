"""What may go wrong in a network: output that is no data, and memory that runs out."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from networks import random_slab
from volumes import smooth_volume

from emdiffuse_vol.errors import BlockError
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.modes import isotropic_mode
from emdiffuse_vol.reconstruct.device import Device
from emdiffuse_vol.reconstruct.greys import GreyMap
from emdiffuse_vol.reconstruct.plan import plan_blocks
from emdiffuse_vol.reconstruct.predict import predict_block
from emdiffuse_vol.reconstruct.predictors import PlanePredictor, Sampling, SlabPredictor
from emdiffuse_vol.stores.volume import mirror_into, mirror_source

CPU = Device("cpu", "float32")
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


def codes_of(predictor, sections: np.ndarray) -> np.ndarray:
    mode = isotropic_mode(sections.shape, (20, 10, 10))
    plan = plan_blocks(mode, mode.region(None), predictor.tiling, None, (64, 128, 128))
    block = plan[0]
    source = mirror_source(block.read, sections.shape)
    greys = mirror_into(sections[source.slices()], source, block.read, sections.shape)
    return predict_block(plan, block, predictor, greys, GreyMap(0, 255), 1.0)


@cache
def net() -> UNet:
    torch.manual_seed(0)
    return UNet(in_channels=3, slices=True).eval().requires_grad_(False)


def published(sections: np.ndarray) -> PlanePredictor:
    mode = isotropic_mode(sections.shape, (20, 10, 10))
    return PlanePredictor(net(), mode, Sampling(2, 0, "ddim", 1, (1, 28, 28)), CPU)


def slab(sections: np.ndarray) -> SlabPredictor:
    return SlabPredictor(
        random_slab(), isotropic_mode(sections.shape, (20, 10, 10)), Sampling(2, 0, "ancestral", 1, None), CPU
    )


@pytest.fixture(scope="module")
def sections() -> np.ndarray:
    return smooth_volume((2, 28, 56))


def short_of_memory(predictor, fits: int, error: Exception, times: int = 10**6) -> list[int]:
    """Make a predictor fail for batches above a size; returns the sizes it is asked for."""
    kind, original, asked = type(predictor), type(predictor).__call__, []

    class Short(kind):  # type: ignore[misc,valid-type]
        def __call__(self, tiles):
            size = self.batch
            asked.append(size)
            if size > fits and len(asked) <= times:
                raise error
            return original(self, tiles)

    predictor.__class__ = Short
    return asked


def test_a_batch_that_does_not_fit_is_halved_and_stays_so(sections: np.ndarray) -> None:
    predictor = published(sections)
    predictor.batch = 4
    asked = short_of_memory(predictor, 1, OUT_OF_MEMORY[0])
    codes = codes_of(predictor, sections)
    assert asked[:3] == [4, 2, 1] and set(asked[3:]) == {1} and predictor.batch == 1
    assert (codes == codes_of(published(sections), sections)).all()  # as if it had been so from the start
    assert codes_of(predictor, sections).shape == codes.shape and set(asked[3:]) == {1}


def test_batches_differ_by_rounding_at_most(sections: np.ndarray) -> None:
    """On a CPU the batch is 1 from the start: what a matrix product rounds to depends on its number of rows."""
    outputs = []
    for batch in (1, 2, 4):
        predictor = published(sections)
        assert predictor.batch == 1
        predictor.batch = batch
        outputs.append(codes_of(predictor, sections).astype(int))
    assert np.abs(outputs[1] - outputs[0]).max() <= 1 and np.abs(outputs[2] - outputs[0]).max() <= 1
    assert (outputs[2] != outputs[0]).mean() < 1e-3


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "cpu", "numpy"])
def test_a_single_tile_is_tried_once_more(sections: np.ndarray, error: Exception) -> None:
    expected = codes_of(slab(sections), sections)
    predictor = slab(sections)
    asked = short_of_memory(predictor, 0, error, times=1)
    assert (codes_of(predictor, sections) == expected).all() and asked == [1, 1]


def test_a_tile_that_does_not_fit_says_what_to_do(sections: np.ndarray) -> None:
    predictor = slab(sections)
    asked = short_of_memory(predictor, 0, OUT_OF_MEMORY[0])
    with pytest.raises(BlockError, match=r"block 0 .*use a smaller --tile, or fewer --workers") as caught:
        codes_of(predictor, sections)
    assert asked == [1, 1] and "\n" not in str(caught.value)


def test_other_errors_are_not_hidden(sections: np.ndarray) -> None:
    predictor = slab(sections)
    short_of_memory(predictor, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        codes_of(predictor, sections)


def give(monkeypatch: pytest.MonkeyPatch, grey: float) -> None:
    def constant(self, tiles):
        core = self.tiling.core
        return torch.full((1, *core), grey), torch.full((1, self.members, *core), grey)

    monkeypatch.setattr(SlabPredictor, "__call__", constant)


def test_a_constant_output_is_a_failure(sections: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = slab(sections)
    give(monkeypatch, 0.25)
    with pytest.raises(BlockError, match=r"block 0 .* gave one grey for all"):
        codes_of(predictor, sections)
    give(monkeypatch, np.nan)
    with pytest.raises(BlockError, match=r"block 0 .* NaN"):
        codes_of(predictor, sections)


def test_a_constant_output_of_a_constant_input_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    greys = np.full((2, 60, 90), 40, np.uint8)
    greys[0, 10, 10:13] = 200  # specks may be lost
    predictor = slab(greys)
    give(monkeypatch, -0.5)
    assert (codes_of(predictor, greys)[0, 1] == 64).all()
