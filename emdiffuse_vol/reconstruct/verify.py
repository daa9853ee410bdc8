"""Is on disk what the ledger says? Every finished block is read again and compared with its recorded checksum.

Convention: a checksum is of voxels, not of bytes, so that it says the same whatever compressed them. Nothing is
changed unless asked; then blocks that do not match are marked pending and the output unsealed: the same command that
made it makes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.executors import available_cores
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.reconstruct.engine import Level, Stage, stages
from emdiffuse_vol.reconstruct.job import Job
from emdiffuse_vol.reconstruct.ledger import FINISHED, SKIPPED, Ledger, checksum
from emdiffuse_vol.reconstruct.output import Output
from emdiffuse_vol.stores.blocks import read_block


@dataclass(frozen=True)
class Mismatch:
    """what: "blocks" or "level 1", ...; why: for people."""

    what: str
    block: int
    why: str


def verify(
    path: Path, repair: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[int, list[Mismatch]]:
    """Returns how many finished blocks there are, levels included, and those that are not as recorded.

    Raises OutputError where there is no output of ours.
    """
    output = Output(path)
    job, found, done = output.job(), [], 0
    ledgers = [
        (stage, Ledger(path, stage.ledger, stage.grid)) for stage in stages(output, job, permits=1, threads=None)
    ]
    total = sum(ledger.finished for _, ledger in ledgers)
    with ThreadPoolExecutor(available_cores()) as pool:
        for stage, ledger in ledgers:
            sums, wrong = ledger.read("checksum").ravel(), []
            states = ledger.state.ravel()
            finished = (int(n) for n in np.flatnonzero(np.isin(states, FINISHED)))

            def check(number: int, stage: Stage = stage, sums: Any = sums, states: Any = states) -> str | None:
                recorded = None if states[number] == SKIPPED else int(sums[number])
                return _why(path, job, stage, number, recorded)

            while batch := list(islice(finished, 64)):  # bounded: a result is held for few blocks at a time
                for number, why in zip(batch, pool.map(check, batch), strict=True):
                    done += 1
                    progress(done, total)
                    if why is not None:
                        wrong.append(Mismatch(stage.name, number, why))
            if repair and wrong:
                output.seal(False)
                ledger.forget([mismatch.block for mismatch in wrong])
            found += wrong
    output.log("verified", blocks=total, wrong=[vars(mismatch) for mismatch in found[:100]], repair=repair)
    return total, found


def _why(path: Path, job: Job, stage: Stage, number: int, recorded: int | None) -> str | None:
    """recorded: None for a block that was skipped, which is one grey with no uncertainty."""
    level, box = place_of(job, stage, number)
    try:
        values = read_block(path, level, box)
    except InputError as error:
        return str(error)
    if recorded is None:
        constant = (values[0] == values[0, 0, 0, 0]).all() and not values[1].any()
        return None if constant else "it was skipped, and is not one grey"
    here = checksum(values)
    return None if here == recorded else f"voxels have checksum {here:08x}, recorded is {recorded:08x}"


def place_of(job: Job, stage: Stage, number: int) -> tuple[int, Box]:
    """Level and voxels of the stored array that a block of a stage covers."""
    if isinstance(stage, Level):
        return stage.work.level, stage.work.box(number)
    return 0, job.plan.write_box(number).shift(job.plan.offset)


def spread_of(mismatches: list[Mismatch]) -> Iterator[str]:
    """One line for each stage."""
    for what in dict.fromkeys(mismatch.what for mismatch in mismatches):
        numbers = [str(mismatch.block) for mismatch in mismatches if mismatch.what == what]
        yield f"{what}: {', '.join(numbers[:10])}{', ...' if len(numbers) > 10 else ''}"
