"""How many blocks of an output can be relied on, by the self-assessment that EMDiffuse publishes.

Convention: a block is *reliable* where the 99th percentile of its uncertainty is below a threshold, on a scale on which
the greys go from 0 to 1. 0.12 is the published threshold, for the spread of two samples of the published network, and
close to the largest uncertainty that uint8 can hold. Beside it stands what our calibrated uncertainty says by itself:
its mean is the error to be expected of a block, sections that are copied included, and a block is *good* where that is
below ``GOOD`` (``benchmarks/reliability.py`` compares both with errors). Blocks without predictions do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.reconstruct.job import Job
from emdiffuse_vol.reconstruct.ledger import BRIDGED, DONE, Ledger
from emdiffuse_vol.reconstruct.output import Output

PUBLISHED, GOOD = 0.12, 0.05


@dataclass(frozen=True)
class Reliability:
    """Of ``blocks`` blocks that hold predictions: the shares that are reliable and good, None where there is none."""

    blocks: int
    share: float | None
    good: float | None
    threshold: float

    def __str__(self) -> str:
        if self.share is None:
            return "nothing was predicted"
        return (
            f"reliable: {self.share:.0%} of {self.blocks:,} block{'s' if self.blocks > 1 else ''} "
            f"(99th percentile of the uncertainty below {self.threshold:g} of the grey scale); "
            f"expected error below {GOOD:g}: {self.good:.0%}"
        )


def unit_of(job: Job, dtype: str) -> float:
    """Grey levels from 0 to 1 of the scale that thresholds are given on: those of uint8, as published; of other dtypes,
    which rarely fill their range, the contrast that the run has measured."""
    low, high = job.greys
    return 255.0 if dtype == "uint8" else high - low


def predicted(ledger: Ledger) -> NDArray[np.bool_]:
    """Which blocks hold predictions, on their grid."""
    return np.isin(ledger.state, (DONE, BRIDGED))


def of_blocks(field: str, job: Job, ledger: Ledger) -> NDArray[np.float32]:
    """field: p99 or mean, of the uncertainty of each block that holds predictions, on the scale from 0 to 1."""
    values: NDArray[np.float32] = ledger.read(field)[predicted(ledger)]
    return values / np.float32(unit_of(job, job.input_identity["dtype"]))


def reliability(output: Output, threshold: float = PUBLISHED) -> Reliability:
    job = output.job()
    ledger = Ledger(output.path, "", job.plan.grid)
    p99, mean = (of_blocks(field, job, ledger) for field in ("p99", "mean"))
    share, good = (float(flags.mean()) if len(flags) else None for flags in (p99 < threshold, mean < GOOD))
    return Reliability(len(p99), share, good, threshold)
