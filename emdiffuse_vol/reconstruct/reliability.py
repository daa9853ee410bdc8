"""How many blocks of an output can be relied on, by the self-assessment that EMDiffuse publishes.

Convention: a block is *reliable* where the 99th percentile of its uncertainty is below a threshold, on a scale on which
the greys go from 0 to 1. 0.12 is the published threshold, for the spread of two samples of the published network;
``CALIBRATED`` is that of our calibrated uncertainty. Blocks that hold no predictions do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.reconstruct.job import Job
from emdiffuse_vol.reconstruct.ledger import BRIDGED, DONE, Ledger
from emdiffuse_vol.reconstruct.output import Output

PUBLISHED = 0.12


@dataclass(frozen=True)
class Reliability:
    """Of ``blocks`` blocks that hold predictions: the share below the threshold, None where there is no block."""

    blocks: int
    share: float | None
    threshold: float

    def __str__(self) -> str:
        if self.share is None:
            return "nothing was predicted"
        return (
            f"reliable: {self.share:.0%} of {self.blocks:,} block{'s' if self.blocks > 1 else ''} "
            f"(99th percentile of the uncertainty below {self.threshold:g} of the grey scale)"
        )


def unit_of(job: Job, dtype: str) -> float:
    """Grey levels from 0 to 1 of the scale that thresholds are given on: those of uint8, as published; of other dtypes,
    which rarely fill their range, the contrast that the run has measured."""
    low, high = job.greys
    return 255.0 if dtype == "uint8" else high - low


def block_p99(job: Job, ledger: Ledger) -> NDArray[np.float32]:
    """99th percentile of the uncertainty of each block that holds predictions, on the scale from 0 to 1."""
    made = np.isin(ledger.state, (DONE, BRIDGED))
    p99: NDArray[np.float32] = ledger.read("p99")[made]
    return p99 / np.float32(unit_of(job, job.input_identity["dtype"]))


def reliability(output: Output, threshold: float = PUBLISHED) -> Reliability:
    job = output.job()
    p99 = block_p99(job, Ledger(output.path, "", job.plan.grid))
    return Reliability(len(p99), float((p99 < threshold).mean()) if len(p99) else None, threshold)
