"""Weights files: a network and everything needed to build it and to know what it is good for.

Convention. A weights file is a ``.safetensors`` whose header names its ``architecture``, a key of ``MODELS``, and
holds as JSON: ``config`` (arguments of that entry), ``modes`` (list of the modes it serves) and facts about the
weights, among them ``name``, ``gaps`` ([least, greatest] distance of sections in lateral pixels; absent: not known),
``factor`` (of weights that serve one alone), ``greys`` ("percentiles" or "dtype", how input is normalised),
``calibration`` (gap -> scale of the spread), ``training`` and ``origin``. Files published with the paper,
``*_Network.pth`` and ``*_Network_ema.pth``, are read as they are. Nothing is unpickled but tensors, and a file is
refused unless it holds exactly the parameters of the network, each with its own name and shape.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emdiffuse_vol.errors import WeightsError
from emdiffuse_vol.models import registry
from emdiffuse_vol.models.download import checksum
from emdiffuse_vol.models.ensemble import SlabEnsemble
from emdiffuse_vol.models.plane import PlaneNet
from emdiffuse_vol.models.registry import embedded, served_gaps
from emdiffuse_vol.models.section import SectionNet
from emdiffuse_vol.models.slab import SlabNet
from emdiffuse_vol.models.unet import UNet

__all__ = [
    "EMBEDDED",
    "MODELS",
    "PUBLISHED_BUFFERS",
    "Weights",
    "default_weights",
    "describe",
    "embedded",
    "load_weights",
    "save_weights",
]

EMBEDDED = "vemdiffuse-a-fast"  # of the default mode

MODELS: dict[str, Callable[..., nn.Module]] = {
    "slab": SlabNet,
    "slab-ensemble": SlabEnsemble,
    "plane": PlaneNet,
    "section": SectionNet,
    "unet-vem": partial(UNet, in_channels=3, slices=True),
    "unet-2d": partial(UNet, in_channels=2, slices=False),
}

# What published files say about themselves is the shape of their first convolution; the factor R is not in the file.
PUBLISHED_INPUT = "input_blocks.0.0.weight"
PUBLISHED = {
    3: ("unet-vem", ["vEMDiffuse-i", "vEMDiffuse-a"]),
    2: ("unet-2d", ["EMDiffuse-n", "EMDiffuse-r"]),
}
# The training schedule, stored beside the parameters of `_Network.pth`; ours is `schedules.published_train`.
PUBLISHED_BUFFERS = {
    "gammas",
    "sqrt_recip_gammas",
    "sqrt_recipm1_gammas",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
}


@dataclass(frozen=True)
class Weights:
    """A network ready for inference: float32, on the CPU, in eval mode, asking for no gradients."""

    name: str
    path: Path
    sha256: str  # of the file's bytes
    architecture: str
    config: dict[str, Any]
    metadata: dict[str, Any]  # the header, decoded, without architecture and config
    net: nn.Module

    def calibrated_scale(self, gap: float, members: int) -> float:
        """What the members' spread is to be multiplied by, for sections ``gap`` pixels apart; 1 where nothing is known.

        Between gaps that were calibrated it is interpolated. For another number of members than was calibrated with,
        it changes as the t quantile does that turns a spread of K values into an interval of 90 %.
        """
        from scipy.special import stdtrit  # quantile of Student's t

        table = self._calibration("scale")
        if not table:
            return 1.0
        calibrated = self.metadata["calibration"].get("members", members)
        few = float(stdtrit(members, 0.95) / stdtrit(calibrated, 0.95))
        return float(np.interp(gap, list(table), list(table.values()))) * few

    def measured_coverage(self, gap: float, members: int) -> float | None:
        """Of the 90 % interval, when it was measured for this gap and number of members."""
        if self.metadata.get("calibration", {}).get("members", members) != members:
            return None
        return self._calibration("coverage").get(gap)

    def _calibration(self, name: str) -> dict[float, float]:
        table = self.metadata.get("calibration", {}).get(name, {})
        return {float(key): float(table[key]) for key in sorted(table, key=float)}

    @property
    def gaps(self) -> tuple[float, float] | None:
        """[least, greatest] distance of sections in lateral pixels that is served; None: not known."""
        return served_gaps(self.metadata)

    def check(self, mode: str, gap: float, factor: Fraction | None = None) -> None:
        """Refuse a mode, a factor, or a distance of sections in lateral pixels, that the weights were not made for."""
        modes = self.metadata["modes"]
        if mode not in modes:
            raise WeightsError(f"weights {self.name} serve {', '.join(modes)}, not {mode}; choose other weights")
        only = self.metadata.get("factor")
        if only is not None and factor is not None and factor != only:
            raise WeightsError(
                f"weights {self.name} serve factor {only} alone, not {factor}; choose other weights, or --factor {only}"
            )
        least, greatest = self.gaps or (gap, gap)
        if not least <= gap <= greatest:
            raise WeightsError(
                f"weights {self.name} serve sections {least:g} to {greatest:g} pixels apart, not {gap:g}; "
                f"choose other weights, or correct the --voxel-size"
            )


def save_weights(
    path: Path, net: nn.Module, *, architecture: str, config: dict[str, Any], modes: list[str], **metadata: Any
) -> None:
    """Write a weights file; ``metadata`` is anything JSON can say."""
    facts = {"config": config, "modes": modes, **metadata}
    header = {"architecture": architecture} | {key: json.dumps(value) for key, value in facts.items()}
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path, header)


def default_weights(mode: str) -> str:
    """Name of the weights that serve a mode where none are asked for."""
    return f"{mode.lower()}-fast"


def load_weights(name_or_path: str = EMBEDDED, sha256: str | None = None) -> Weights:
    """Weights by the name of embedded or imported ones, by the path of a ``.safetensors`` or published ``.pth`` file,
    or by a URL with its checksum (see ``registry.find``, also for ``sha256``). Raises WeightsError."""
    path = registry.find(name_or_path, sha256)
    if path.suffix == ".safetensors":
        architecture, facts, state = _read_ours(path)
    elif path.suffix == ".pth":
        architecture, facts, state = _read_published(path)
    else:
        raise WeightsError(f"weights {path} are neither .safetensors nor a published .pth")
    config = facts.pop("config")
    net = _build(path, architecture, config, state)
    return Weights(facts.get("name", path.stem), path, checksum(path), architecture, config, facts, net)


def describe(weights: Weights) -> dict[str, Any]:
    """All that is known of weights, as JSON values."""
    facts = weights.metadata
    parameters = sum(value.numel() for value in weights.net.state_dict().values())
    header = registry.Header(weights.architecture, facts, parameters)
    training = facts.get("training")
    return registry.summary(weights.path, header) | {
        "sha256": weights.sha256,
        "config": weights.config,
        "greys": facts.get("greys"),
        "calibration": facts.get("calibration"),
        "training": training,
        "licence": facts.get("licence") or (training or {}).get("licence"),
        "source": facts.get("origin", {}),
        "card": registry.card_of(weights.path),
    }


def _read_ours(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    header = registry.read_header(path)
    try:
        return header.architecture, header.facts, load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"weights {path} are damaged or no safetensors file: {error}") from error


def _read_published(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"weights {path} hold something else than tensors, or are damaged: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"weights {path} are no state dict; expected *_Network.pth or *_Network_ema.pth")
    state = {key.removeprefix("denoise_fn."): value for key, value in content.items() if key not in PUBLISHED_BUFFERS}
    channels = state[PUBLISHED_INPUT].shape[1] if PUBLISHED_INPUT in state else None
    if channels not in PUBLISHED:
        raise WeightsError(f"weights {path} are not of EMDiffuse: no {PUBLISHED_INPUT} of 2 or 3 input channels")
    architecture, modes = PUBLISHED[channels]
    return architecture, {"config": {}, "modes": modes, "greys": "dtype"}, state


def _build(path: Path, architecture: str, config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    if architecture not in MODELS:
        raise WeightsError(f"weights {path} are of architecture {architecture}; known: {', '.join(MODELS)}")
    try:
        with torch.device("meta"):  # no initialisation, so no draw from the global generator
            net = MODELS[architecture](**config)
    except TypeError as error:
        raise WeightsError(f"weights {path} have a config that {architecture} does not take: {error}") from error
    misfits = _misfits({key: value.shape for key, value in net.state_dict().items()}, state)
    if misfits:
        raise WeightsError(f"weights {path} do not fit architecture {architecture}: {', '.join(misfits)}")
    net.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return net.eval().requires_grad_(False)


def _misfits(expected: dict[str, torch.Size], state: dict[str, Tensor]) -> list[str]:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    reshaped = [key for key in expected if key in state and state[key].shape != expected[key]]
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys missing (first: {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected (first: {unexpected[0]})")
    if reshaped:
        key = reshaped[0]
        shapes = f"found {tuple(state[key].shape)}, expected {tuple(expected[key])}"
        parts.append(f"{len(reshaped)} of another shape (first: {key}: {shapes})")
    return parts
