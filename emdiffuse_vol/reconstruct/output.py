"""The output of a run: an OME-Zarr image that knows what made it, its ledger, and a log of events.

Convention: ``OUT.zarr`` appears at once and whole (built beside itself, then renamed), with every array empty. Its
group attributes hold under ``ome`` what viewers need and under ``emdvol``: ``fingerprint`` (what decides the voxels),
``job`` (all that workers need to go on), ``provenance`` (where the voxels come from), ``geometry``, ``uncertainty``
and ``sealed``. ``events.jsonl`` is the log of the run, a JSON object a line: starts, tries again, failures with their
traceback, ends. An output of another fingerprint is refused, never mixed.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from emdiffuse_vol import __version__
from emdiffuse_vol.errors import OutputError
from emdiffuse_vol.geometry.boxes import Triple, grid_shape
from emdiffuse_vol.reconstruct.greys import Codes
from emdiffuse_vol.reconstruct.job import Job, differences
from emdiffuse_vol.reconstruct.ledger import Ledger
from emdiffuse_vol.reconstruct.presence import drivers
from emdiffuse_vol.reconstruct.resources import check_resources
from emdiffuse_vol.reconstruct.software import software
from emdiffuse_vol.stores.convert import swap
from emdiffuse_vol.stores.image import create_image
from emdiffuse_vol.stores.metadata import read_attributes, write_attributes
from emdiffuse_vol.stores.pyramid import pyramid_shapes

if TYPE_CHECKING:
    from emdiffuse_vol.models.checkpoints import Weights
    from emdiffuse_vol.reconstruct.run import Prepared

logger = logging.getLogger(__name__)


class Output:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.ended: dict[str, Any] = {}  # what was told of this process's work at its end

    @property
    def attributes(self) -> dict[str, Any]:
        """Under ``emdvol``; empty where there is no output, or somebody else's."""
        found: dict[str, Any] = read_attributes(self.path).get("emdvol", {})
        return found

    @property
    def sealed(self) -> bool:
        return bool(self.attributes.get("sealed"))

    def job(self) -> Job:
        """What is being made here. Raises OutputError where it is no output of ours, or of another version."""
        found = self.attributes.get("job")
        if found is None:
            raise OutputError(f"{self.path} is no output of emdvol reconstruct, expected one; check the path")
        if found.get("version") != __version__:
            raise OutputError(
                f"{self.path} was begun by emdiffuse_vol {found.get('version')}, this is {__version__}; use that one"
            )
        return replace(Job.of(found), out=str(self.path.absolute()))

    def check_software(self) -> None:
        """Raises OutputError where other versions than ours have begun it: the rest could differ in its last bits."""
        if unlike := self._other_software():
            raise OutputError(f"{self.path} was begun with other software: {'; '.join(unlike)}; use the same to go on")

    def _other_software(self) -> list[str]:
        """How ours is unlike what has begun an output; of a sealed one, for which nothing is computed, no matter."""
        found, ours = self.attributes, software()
        if found.get("sealed"):
            return []
        begun = found.get("provenance", {}).get("software", {})
        return differences({name: begun.get(name) for name in ours}, ours)

    def level_shapes(self) -> list[Triple]:
        return pyramid_shapes(tuple(self.attributes["geometry"]["shape"]))

    def open_or_create(self, prepared: Prepared, overwrite: bool) -> None:
        """Continue an output of the same fingerprint, or create one. Raises OutputError for any other that exists."""
        if not self._continues(prepared.job, overwrite):
            self._create(prepared, overwrite)
        self._sweep()

    def _continues(self, job: Job, overwrite: bool) -> bool:
        """Whether there is an output of this job; False where there is none, or one that may be replaced."""
        if not self.path.exists():
            return False
        found = self.attributes.get("fingerprint")
        if found is None:
            raise OutputError(f"{self.path} exists and is no output of emdvol reconstruct; choose another --out")
        unlike = differences(found, job.fingerprint()) or self._other_software()
        if unlike and not overwrite:
            raise OutputError(
                f"{self.path} belongs to another run: {'; '.join(unlike)}; "
                f"use the same settings to continue it, another --out, or --overwrite to replace it"
            )
        if unlike and (at_work := [f"process {d.pid} on {d.host}" for d in drivers(self.path) if d.live]):
            raise OutputError(f"{self.path} is being made by {', '.join(at_work)}; stop that before --overwrite")
        return not unlike

    def _create(self, prepared: Prepared, overwrite: bool) -> None:
        check_resources(self.path, prepared.disk_bytes, prepared.memory_bytes)
        # A name of its own: two drivers may create the output at once.
        fresh = self.path.with_name(f".{self.path.name}.new-{uuid4().hex[:8]}")
        try:
            fresh.parent.mkdir(parents=True, exist_ok=True)
            self._fill(fresh, prepared)
            # The faster one may be at work in its output by now, so that must stay: rename refuses to replace it.
            if not self._continues(prepared.job, overwrite):
                swap(fresh, self.path) if overwrite else fresh.rename(self.path)
        except (OSError, OutputError) as error:
            if self._continues(prepared.job, overwrite):
                return
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"cannot create {self.path}: {error.strerror or error}; choose another --out") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what killed starts have left: nobody needs it, now that there is an output."""
        fresh, old = f".{self.path.name}.new-", f".{self.path.name}.old"
        with suppress(OSError):
            for path in self.path.absolute().parent.iterdir():
                if path.name == old or path.name.startswith(fresh):
                    shutil.rmtree(path, ignore_errors=True)

    def _fill(self, path: Path, prepared: Prepared) -> None:
        plan = prepared.plan
        shapes = pyramid_shapes(plan.region.shape)
        create_image(
            str(path),
            shape=(2, *plan.region.shape),
            dtype=prepared.volume.spec.dtype,
            voxel_size=prepared.voxel_size,
            origin=prepared.origin,
            axes="czyx",
            chunk=(2, *plan.chunk),
            shard=(2, *plan.shard),
            levels=len(shapes),
            name=self.path.name.removesuffix(".zarr"),
            omero=display(prepared),
            attributes={"emdvol": describe(prepared)},
        )
        Ledger.create(path, "", plan.grid)
        for level, shape in enumerate(shapes[1:], start=1):
            Ledger.create(path, f"level{level}", grid_shape(shape, plan.shard))

    def log(self, event: str, **facts: Any) -> None:
        """One line, appended at once, so that several processes can. Nothing depends on it: a full disk may refuse."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        facts = {"time": moment, "event": event, "host": platform.node(), "pid": os.getpid(), **facts}
        logger.info("%s %s", event, {key: value for key, value in facts.items() if key != "traceback"})
        with suppress(OSError), (self.path / "events.jsonl").open("ab", buffering=0) as log:
            log.write((json.dumps(facts) + "\n").encode())

    def events(self) -> list[dict[str, Any]]:
        """All lines of the log that are whole."""
        found = []
        with suppress(OSError):
            for line in (self.path / "events.jsonl").read_text(errors="replace").splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def end(self, facts: dict[str, Any]) -> None:
        """This process has done its part."""
        self.ended = facts
        self.log("end", **facts)

    def seal(self, sealed: bool = True) -> None:
        attributes = read_attributes(self.path)
        attributes["emdvol"]["sealed"] = sealed
        write_attributes(self.path, attributes)
        self.log("sealed" if sealed else "unsealed")


def describe(prepared: Prepared) -> dict[str, Any]:
    """What the output says of itself, completely enough to make it again."""
    job, plan, weights = prepared.job, prepared.plan, prepared.weights
    codes = Codes(prepared.volume.spec.dtype)
    return {
        "sealed": False,
        "fingerprint": job.fingerprint(),
        "job": job.stored(),
        "provenance": {
            "software": {"python": platform.python_version(), **software()},
            "input": job.input,
            "input_options": job.input_options,
            "weights": _provenance(weights),
            "first_weights": _provenance(prepared.first) if prepared.first else None,
        },
        "geometry": {
            "shape": plan.region.shape,
            "factor": job.factor,
            "first_plane": plan.region.start[0],
            "input_sections": job.input_shape[0],
            "block": plan.block,
        },
        "greys": {"low": job.greys[0], "high": job.greys[1], "inverted": job.inverted},
        "uncertainty": {
            "channel": 1,
            "step": codes.step,
            "largest": codes.largest,
            "meaning": "greys = code * step; calibrated members' spread; 0 on sections that are copied",
            "scale": job.scale,
            "interval": "mean +- 1.645 * uncertainty is meant to hold the truth in 90 % of voxels",
            # Of two networks in a chain nobody has measured it.
            "measured_coverage": None if prepared.first else weights.measured_coverage(job.gap, job.members),
        },
    }


def _provenance(weights: Weights) -> dict[str, Any]:
    return {"name": weights.name, "sha256": weights.sha256, "training": weights.metadata.get("training")}


def display(prepared: Prepared) -> dict[str, Any]:
    """How viewers show the two channels: mean in grey between the measured percentiles, uncertainty in orange."""
    job = prepared.job
    codes = Codes(prepared.volume.spec.dtype)
    low, high = job.greys
    width = (high - low) / 4 / codes.step
    most = codes.largest / codes.step if codes.largest is not None else None

    def channel(label: str, color: str, start: float, end: float) -> dict[str, Any]:
        window = {"min": min(0.0, start), "max": most or max(end, 0.0), "start": start, "end": end}
        return {
            "label": label,
            "color": color,
            "active": True,
            "coefficient": 1,
            "family": "linear",
            "inverted": False,
            "window": window,
        }

    return {
        "channels": [
            channel("mean", "FFFFFF", low, high),
            channel("uncertainty", "FF8000", 0.0, min(width, most or width)),
        ],
        "rdefs": {"defaultT": 0, "defaultZ": prepared.plan.region.shape[0] // 2, "model": "color"},
    }
