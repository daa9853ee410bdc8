"""Blocks computed one by one as a worker does, without stores, processes or a ledger around them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from emdiffuse_vol.reconstruct.empty import open_emptiness
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.plan import Block
from emdiffuse_vol.reconstruct.predict import predict_block
from emdiffuse_vol.reconstruct.run import Prepared, prepare
from emdiffuse_vol.reconstruct.source import open_input
from emdiffuse_vol.stores.volume import read_mirrored


def compute(request: Request, **decided: Any) -> np.ndarray:
    """-> codes [2, z, y, x] of the whole region. decided: parts of the job to change."""
    prepared = prepare(request)
    prepared = replace(prepared, job=replace(prepared.job, **decided))
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
