"""What an output is like, to the next driver and to readers that are not ours."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path


def file_hashes(path: Path) -> dict[str, str]:
    """Of all files of the image's arrays. Locks that killed writers left are not read by anybody: counted elsewhere."""
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.relative_to(path).parts[0].isdigit())
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.suffix != ".__lock"
    }


@dataclass
class State:
    """Finished blocks of each stage. wrong: those recorded whose voxels are not on disk."""

    finished: dict[str, int] = field(default_factory=dict)
    unfinished: int = 0
    wrong: list[str] = field(default_factory=list)
    sealed: bool = False

    @property
    def stage(self) -> str:
        if not self.finished:
            return "not created"
        if self.sealed:
            return "sealed"
        return " ".join(f"{name}:{count}" for name, count in self.finished.items())


def look_at(out: Path) -> State:
    """Read an output as the next driver would, and each recorded block."""
    from emdiffuse_vol.reconstruct.engine import stages
    from emdiffuse_vol.reconstruct.ledger import FINISHED, Ledger, checksum
    from emdiffuse_vol.reconstruct.output import Output
    from emdiffuse_vol.reconstruct.verify import place_of
    from emdiffuse_vol.stores.blocks import read_block

    state, output = State(), Output(out)
    if not out.exists():
        return state
    job = output.job()
    state.sealed = output.sealed
    for stage in stages(output, job, 1, 1):
        ledger = Ledger(out, stage.ledger, stage.grid)
        state.finished[stage.name] = ledger.finished
        state.unfinished += len(ledger) - ledger.finished
        sums = ledger.read("checksum").ravel()
        for index in (i for i in range(len(ledger)) if ledger.state.ravel()[i] in FINISHED):
            if checksum(read_block(out, *place_of(job, stage, index))) != sums[index]:
                state.wrong.append(f"{stage.name} {index}")
    return state


def cannot_open(out: Path) -> str:
    """Why a reader that is not ours refuses the image; empty where it does not."""
    try:
        import ome_zarr_models
    except ModuleNotFoundError:
        return ""
    try:
        ome_zarr_models.open_ome_zarr(str(out), version="0.5")
    except Exception as error:  # whatever it says
        return " ".join(str(error).split())[:300]
    return ""
