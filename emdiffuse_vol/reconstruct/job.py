"""What a run is: the request a user makes, and the job it becomes once everything is known.

Convention: a ``Request`` holds what was asked for, with None for "choose"; a ``Job`` holds what was decided, is plain
enough to be written as JSON and sent to other processes, and decides every output voxel. Its ``fingerprint`` names
the parts that do; executor and number of workers are not among them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from emdiffuse_vol import __version__
from emdiffuse_vol.executors.slurm import Slurm
from emdiffuse_vol.geometry.axial import AxialGrid, good_sections
from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.geometry.tiles import Tiling
from emdiffuse_vol.modes import Chain, Isotropic, Mode, SectionWise
from emdiffuse_vol.modes.mode import finer_shape
from emdiffuse_vol.reconstruct.greys import GreyMap, SectionMap
from emdiffuse_vol.reconstruct.plan import Plan, plan_blocks


@dataclass(frozen=True)
class Request:
    """Keys of the JSON configuration; each is a flag of ``emdvol reconstruct``. Sizes are z, y, x. ``adapt`` is the
    time to spend on adapting the weights to the input before anything else (see ``training.adapt``)."""

    # Unknown keys in a configuration file are refused (read by pydantic in ``config``).
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    input: str
    out: str
    mode: str = "vEMDiffuse-a"
    weights: str | None = None  # those that come with the package for the mode, the fast ones
    adapt: str | None = None
    factor: str | int | float | None = None
    target_voxel_size: float | None = None
    voxel_size: tuple[float, float, float] | None = None
    level: int = 0
    channel: int | None = None
    roi: str | None = None
    members: int = 4
    seed: int = 0
    sampler: str = "ancestral"
    steps: int = 200
    tile: Triple | None = None
    block: Triple | None = None
    shard: Triple | None = None
    invert: bool = False
    even_sections: bool = False
    damaged: str | None = None
    mask: str | None = None
    skip_empty: bool = True
    device: str = "auto"
    precision: str = "auto"
    executor: str | None = None
    workers: int | None = None
    scheduler: str | None = None
    cluster: Slurm | None = None
    patience: float = 30.0
    overwrite: bool = False


@dataclass(frozen=True)
class Job:
    """``sections``: of what is done to sections, if anything is: output pixels for one of the input, sections of
    context, input pixels that it sees. ``first_weights``: what does it in a chain. ``inverted``: what is bright becomes
    dark before a network sees it, and bright again after. ``section_greys``: gains and offsets of a SectionMap."""

    input: str
    input_options: dict[str, Any]
    input_identity: dict[str, Any]
    input_shape: Triple
    out: str
    mode: str
    weights: str
    weights_sha256: str
    factor: str
    damaged: tuple[int, ...]
    gap: float
    widest_gap: float
    region: tuple[Triple, Triple]
    members: int
    seed: int
    sampler: str
    steps: int
    tile: Triple | None
    greys: tuple[float, float]
    scale: float
    bridged_scale: dict[str, float]
    empty: dict[str, Any]
    tiling: tuple[Triple, Triple, bool]
    block: Triple
    shard: Triple
    device: str
    precision: str
    first_weights: str | None = None
    first_weights_sha256: str | None = None
    sections: Triple | None = None
    inverted: bool = False
    section_greys: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    version: str = __version__

    @staticmethod
    def of(stored: dict[str, Any]) -> Job:
        """From what :meth:`stored` gave, through JSON."""
        return Job(**{key: _tuples(value) for key, value in stored.items()})

    def stored(self) -> dict[str, Any]:
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    @cached_property
    def plan(self) -> Plan:
        return plan_blocks(self.plan_mode(), Box(*self.region), Tiling(*self.tiling), self.block, self.shard)

    def plan_mode(self) -> Mode:
        """The mode on this job's volume."""
        if self.sections is None:
            return self._isotropic(self.input_shape)
        lateral, context, halo = self.sections
        if self.first_weights is None:
            return SectionWise(self.input_shape, lateral, context)
        good = (len(good_sections(self.input_shape[0], self.damaged)), *self.input_shape[1:])
        first = SectionWise(good, lateral, context)
        return Chain(self.input_shape, first, self._isotropic(finer_shape(self.input_shape, lateral)), halo)

    def _isotropic(self, shape: Triple) -> Isotropic:
        axial = AxialGrid(shape[0], Fraction(self.factor), self.damaged)
        return Isotropic(shape, axial, self.gap, self.widest_gap)

    @property
    def scales(self) -> dict[int, float]:
        """Stored uncertainty over the members' spread, for each span of good sections."""
        return {1: self.scale} | {int(span): scale for span, scale in self.bridged_scale.items()}

    @property
    def grey_map(self) -> GreyMap:
        low, high = self.greys
        return GreyMap(high, low) if self.inverted else GreyMap(low, high)

    @cached_property
    def section_map(self) -> SectionMap:
        return SectionMap(*self.section_greys)

    @cached_property
    def key(self) -> str:
        """The whole job as text: equal for equal jobs."""
        return json.dumps(asdict(self), sort_keys=True)

    def fingerprint(self) -> dict[str, Any]:
        """The parts that decide the output, each with its value; paths may differ, the data behind them may not."""
        parts = self.stored()
        for name in ("input", "input_options", "input_shape", "out", "weights", "first_weights", "gap", "widest_gap"):
            del parts[name]
        if parts["empty"]["mask"]:
            del parts["empty"]["mask"]["path"]
        return parts


def _plain(value: Any) -> Any:
    """As it will come back from JSON."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def differences(found: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """One phrase for each part in which two fingerprints differ."""
    names = sorted(found.keys() | asked.keys())
    return [
        f"{n} is {_short(found.get(n))} there, {_short(asked.get(n))} here"
        for n in names
        if found.get(n) != asked.get(n)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
