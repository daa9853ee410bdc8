"""Dense flow between two images that nearly coincide.

Convention: a backend is a function (fixed, moving) -> displacement [2, y, x], (y, x) in pixels: what the fixed image
shows at p, the moving one shows at p + displacement. Images are float32 [y, x] of one shape, locally normalised.

``ilk``   iterative Lucas-Kanade (scikit-image): least squares in windows, so noise averages out; the default
``tvl1``  total variation and an L1 norm (scikit-image): follows jumps, feels noise more
``raft``  RAFT (Teed and Deng 2020, torchvision), which EMDiffuse used; weights are downloaded, or given by path
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.registration import optical_flow_ilk, optical_flow_tvl1

from emdiffuse_vol.errors import ConfigError, WeightsError
from emdiffuse_vol.registration.warps import Floats

Flow = Callable[[Floats, Floats], Floats]

FLOWS = ("ilk", "tvl1", "raft")
RADIUS = 16  # of Lucas-Kanade's windows: larger ones feel less noise, smaller ones follow sharper bends
SHARP, LOCAL = 0.7, 20.0  # pixels: standard deviations of the smoothing, and of what counts as local
RAFT_MULTIPLE, RAFT_LEAST = 8, 128  # sides that the network takes
RAFT_UPDATES = 20  # as EMDiffuse used it


def choose_flow(name: str, weights: str | None = None) -> Flow:
    """weights: of RAFT, a state dict of torchvision's ``raft_large``. Raises ConfigError, WeightsError."""
    if name not in FLOWS:
        raise ConfigError(f"flow {name!r} is unknown; choose one of {', '.join(FLOWS)}, none")
    if weights is not None and name != "raft":
        raise ConfigError(f"flow {name} takes no weights; leave them out, or choose --flow raft")
    if name == "raft":
        return partial(raft_flow, load_raft(weights))
    return ilk_flow if name == "ilk" else tvl1_flow


def normalised(image: Floats) -> Floats:
    """Local mean 0 and standard deviation 1: brightness and contrast are not what is to be matched."""
    smooth = ndimage.gaussian_filter(image.astype(np.float32), SHARP)
    centred = smooth - ndimage.gaussian_filter(smooth, LOCAL)
    power = ndimage.gaussian_filter(centred * centred, LOCAL)
    return np.asarray(centred / np.sqrt(power + 1e-6 * max(float(power.max()), 1e-6)), np.float32)


def ilk_flow(fixed: Floats, moving: Floats) -> Floats:
    return np.stack(optical_flow_ilk(fixed, moving, radius=RADIUS, gaussian=True))


def tvl1_flow(fixed: Floats, moving: Floats) -> Floats:
    return np.stack(optical_flow_tvl1(fixed, moving, attachment=5))


def load_raft(weights: str | None) -> Any:
    """torchvision's ``raft_large``. Raises ConfigError without torchvision, WeightsError for weights that do not fit
    or cannot be had."""
    try:
        from torchvision.models import optical_flow as networks
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision made for another torch
        raise ConfigError(
            f"flow raft needs torchvision ({error}); install it with: pip install 'emdiffuse_vol[raft]'"
        ) from error
    import torch

    if weights is not None and not os.path.isfile(weights):
        raise WeightsError(f"{weights} is not a file; give a state dict of torchvision's raft_large")
    try:
        if weights is None:
            net = networks.raft_large(weights=networks.Raft_Large_Weights.DEFAULT)
        else:
            net = networks.raft_large(weights=None)
            net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a download, an unpickler or a state dict raises
        where = weights or "the download of torchvision's weights"
        said = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise WeightsError(f"{where} gave no weights of raft_large: {said}; give --flow-weights FILE") from error
    return net.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def raft_flow(net: Any, fixed: Floats, moving: Floats) -> Floats:
    """Images are mirrored up to sides that the network takes."""
    import torch

    height, width = fixed.shape
    sides = [max(RAFT_LEAST, -(-n // RAFT_MULTIPLE) * RAFT_MULTIPLE) for n in (height, width)]
    pad = [(0, sides[0] - height), (0, sides[1] - width)]
    device = next(net.parameters()).device
    inputs = [
        torch.from_numpy(np.pad(image, pad, mode="symmetric")).clamp(-3, 3).div(3).expand(1, 3, -1, -1).to(device)
        for image in (fixed, moving)
    ]
    with torch.inference_mode():
        flow = net(*inputs, num_flow_updates=RAFT_UPDATES)[-1][0, :, :height, :width].cpu().numpy()
    return np.asarray(flow[::-1], np.float32)  # RAFT says x before y
