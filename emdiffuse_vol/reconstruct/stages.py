"""From the name of a mode to what it does to one volume, and the weights that do it.

Convention: a chain has two names of weights joined by +, as it has two modes. Weights are checked against the mode and
the volume here; nothing is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from emdiffuse_vol.errors import ConfigError
from emdiffuse_vol.geometry.axial import good_sections, parse_factor
from emdiffuse_vol.geometry.boxes import Triple, ceil_div
from emdiffuse_vol.models.checkpoints import Weights, default_weights, load_weights
from emdiffuse_vol.models.section import SectionNet
from emdiffuse_vol.models.unet import UNet
from emdiffuse_vol.modes import Chain, Isotropic, Mode, SectionWise, isotropic_mode, stages_of
from emdiffuse_vol.modes.mode import finer_shape
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.stores.volume import VolumeSpec


@dataclass(frozen=True)
class Stages:
    """sections: as in a job; first: the weights of the first mode of a chain."""

    mode: Mode
    weights: Weights
    first: Weights | None = None
    sections: Triple | None = None

    @property
    def exact(self) -> bool:
        """Whether the network tells noise levels apart by digits that bfloat16 lacks."""
        return isinstance(self.weights.net, UNet)


def choose_stages(request: Request, spec: VolumeSpec, damaged: tuple[int, ...]) -> Stages:
    """Raises ConfigError, GeometryError and WeightsError."""
    first, then = stages_of(request.mode)
    names = _names(request)
    if first is None:
        return _isotropic(request, spec, damaged, names[-1])
    weights = load_weights(names[0])
    lateral, context, halo = sections = _sections(weights, first)
    weights.check(first, float(lateral), Fraction(lateral))
    if then is None:
        _check_flags(request, damaged, lateral)
        return Stages(SectionWise(spec.shape, lateral, context), weights, None, sections)
    if not isinstance(weights.net, SectionNet):
        raise ConfigError(
            f"weights {weights.name} see a whole tile and a chain needs a network that sees a bounded distance; "
            f"run {first} by itself, then {then} on what it gives"
        )
    z, y, x = spec.voxel_size
    fine = replace(spec, shape=finer_shape(spec.shape, lateral), voxel_size=(z, y / lateral, x / lateral))
    stages = _isotropic(request, fine, damaged, names[1])
    if stages.exact:
        raise ConfigError(
            f"weights {stages.weights.name} take greys of another scale than {weights.name} gives; run {first} by "
            f"itself, then {then} on what it gives"
        )
    assert isinstance(stages.mode, Isotropic)
    good = (len(good_sections(spec.shape[0], damaged)), *spec.shape[1:])
    mode = Chain(spec.shape, SectionWise(good, lateral, context), stages.mode, halo)
    return Stages(mode, stages.weights, weights, sections)


def _names(request: Request) -> list[str]:
    modes = request.mode.split("+")
    if request.weights is None:
        return [default_weights(mode) for mode in modes]
    names = request.weights.split("+") if len(modes) > 1 else [request.weights]
    if len(names) != len(modes):
        raise ConfigError(f"weights {request.weights} are for one mode and {request.mode} are two; join two by a +")
    return names


def _isotropic(request: Request, spec: VolumeSpec, damaged: tuple[int, ...], name: str) -> Stages:
    factor = None if request.factor is None else parse_factor(str(request.factor))
    mode = isotropic_mode(spec.shape, spec.voxel_size, factor, request.target_voxel_size, damaged)
    weights = load_weights(name)
    weights.check(request.mode.rpartition("+")[2], mode.gap, mode.axial.factor)
    return Stages(replace(mode, widest=weights.metadata.get("gaps", (mode.gap, mode.gap))[1]), weights)


def _sections(weights: Weights, mode: str) -> Triple:
    """Output pixels for one of the input, sections of context, and input pixels seen, in whole strides."""
    if isinstance(net := weights.net, SectionNet):
        return net.factor, net.context, ceil_div(net.HALO, net.STRIDE) * net.STRIDE
    # Of the published files only -r knows a factor, and that is 2.
    return int(weights.metadata.get("factor", 2 if mode == "EMDiffuse-r" else 1)), 0, 0


def _check_flags(request: Request, damaged: tuple[int, ...], lateral: int) -> None:
    if damaged:
        raise ConfigError(
            f"{request.mode} restores sections where they are and {len(damaged)} are damaged; vEMDiffuse modes bridge "
            f"such sections, alone or as {request.mode}+vEMDiffuse-a"
        )
    if request.target_voxel_size is not None:
        raise ConfigError(f"--target-voxel-size sets the spacing of planes and {request.mode} keeps it; leave it out")
    if request.factor is not None and parse_factor(str(request.factor)) != lateral:
        raise ConfigError(
            f"--factor {request.factor} was asked for and the weights give {lateral} pixels for one; leave it out, or "
            f"choose other weights"
        )
