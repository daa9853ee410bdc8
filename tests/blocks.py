"""Blocks computed one by one as a worker does, without stores, processes or a ledger around them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.reconstruct.empty import open_emptiness
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.noise import NoiseField
from emdiffuse_vol.reconstruct.plan import Block, Plan
from emdiffuse_vol.reconstruct.predict import Tile, predict_block
from emdiffuse_vol.reconstruct.run import Prepared, prepare
from emdiffuse_vol.reconstruct.source import open_input
from emdiffuse_vol.stores.volume import read_mirrored


def compute(request: Request, **decided: Any) -> np.ndarray:
    """-> codes [2, z, y, x] of the whole region. decided: parts of the job to change."""
    prepared = prepare(request)
    return compute_all(replace(prepared, job=replace(prepared.job, **decided)))


def quick(request: Request) -> np.ndarray:
    """The same without a network."""
    return compute_all(without_network(prepare(request)))


def without_network(prepared: Prepared) -> Prepared:
    return replace(prepared, predictor=Quick(prepared.plan))


class Quick:
    """Linear interpolation, a little too bright, with noise around it; tiles as of the network."""

    batch, members, lost, evaluations = 2, 2, 0, 1

    def __init__(self, plan: Plan) -> None:
        self.tiling = plan.tiling
        self.asked: list[Box] = []

    def __call__(self, tiles: list[Tile]) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += [tile.box for tile in tiles]
        means = []
        for tile in tiles:
            below, above = tile.sections[tile.index], tile.sections[tile.index + 1]
            means.append(below + tile.t[:, None, None] * (above - below) + np.float32(0.02))
        noise = [[0.02 * NoiseField(0).normal(k, 0, tile.box)[0] for k in range(2)] for tile in tiles]
        mean = np.stack(means)
        both = mean, mean[:, None] + np.array(noise, np.float32)
        counted = (..., *self.tiling.reach_of(tiles[0].box).slices(tiles[0].box.start))
        best, drawn = (torch.from_numpy(values[counted]) for values in both)
        return best, drawn

    def flops(self) -> int:
        return 0

    def memory(self) -> int:
        return 0


def compute_all(prepared: Prepared) -> np.ndarray:
    plan = prepared.plan
    codes = np.empty((2, *plan.region.shape), prepared.volume.spec.dtype)
    for index in range(len(plan)):
        block = plan[index]
        codes[(slice(None), *block.write.slices(plan.region.start))] = compute_block(prepared, block)
    return codes


def compute_block(prepared: Prepared, block: Block) -> np.ndarray:
    job = prepared.job
    sections = read_mirrored(open_input(job), block.read)
    fills = open_emptiness(job).fills(block, sections)
    return predict_block(prepared.plan, block, prepared.predictor, sections, job.grey_map, job.scales, fills)
