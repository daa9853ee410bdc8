"""What each change to the default network's path bought, on one core: the account in docs/performance.md.

    python benchmarks/performance.py benchmarks/results/performance.json

Seconds are of the processor, so that others who use the machine disturb little; each is the best of two calls after one
that is not counted. The tile has a core of 16 x 128 x 128 voxels and 4 members; float32 where nothing is said.

    padded      the network as it is trained and as tests compare it: the tile at once, with its margins
    streamed    a few planes at a time, unpadded: what runs do. For several numbers of planes
    noise       of the members: hashed by numpy, and with the integers of torch as on a GPU
    product     of large square matrices: the FLOP/s that this core has
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from predictions import rounded

from emdiffuse_vol import __version__
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.models import slab
from emdiffuse_vol.models.checkpoints import default_weights, load_weights
from emdiffuse_vol.modes import isotropic_mode
from emdiffuse_vol.reconstruct.device import Device
from emdiffuse_vol.reconstruct.estimate import hardware
from emdiffuse_vol.reconstruct.noise import NoiseField
from emdiffuse_vol.reconstruct.predict import Tile
from emdiffuse_vol.reconstruct.predictors import Sampling, SlabPredictor, count_flops

CORE, MEMBERS, SIDE, REPEATS = (16, 128, 128), 4, 1024, 2
STEPS = (1, 2, 4, 8, 16)
Cost = dict[str, float]


@dataclass(frozen=True)
class Sliced(Device):
    """A device whose networks take ``step`` planes at once."""

    step: int = 4  # type: ignore[assignment]


class Case:
    """The default network on a tile of noise."""

    def __init__(self) -> None:
        net: Any = load_weights(default_weights("vEMDiffuse-a")).net
        self.net = net.to(memory_format=torch.channels_last_3d)
        self.mode = isotropic_mode((12, 400, 400), (50, 10, 10))
        self.sampling = Sampling(MEMBERS, 0, "ancestral", 1, CORE)
        tiling = self.predictor(Device("cpu", "float32")).tiling
        self.box = tiling.input_box((1, 1, 1))
        needed = self.mode.read_box(self.box)
        below, t = self.mode.axial.locate(torch.arange(self.box.start[0], self.box.stop[0]).numpy())
        sections = torch.randn(needed.shape, generator=torch.Generator().manual_seed(0))
        self.tile = Tile(self.box, sections.numpy(), below - needed.start[0], t)

    def predictor(self, device: Device) -> SlabPredictor:
        return SlabPredictor(self.net, self.mode, self.sampling, device)

    def streamed(self, device: Device) -> Cost:
        predictor = self.predictor(device)
        return cost(lambda: predictor([self.tile])) | {"flop": predictor.flops()}

    def padded(self) -> Cost:
        tile, t = self.tile, torch.from_numpy(self.tile.t)
        z, y, x = self.box.shape

        def evaluate(net: Any, features: torch.Tensor, noise: Callable[[int], torch.Tensor]) -> None:
            _, fine, coarse = net.trunk(features, t.to(features.device), self.mode.gap)
            gates = net.gates(fine, coarse)
            for k in range(MEMBERS):
                net.spread(gates, noise(k))

        @torch.inference_mode()
        def work() -> None:
            given = slab.slab_features(torch.from_numpy(tile.sections)[None], torch.from_numpy(tile.index), t)
            field = NoiseField(0)
            evaluate(self.net, given, lambda k: torch.from_numpy(field.normal(k, 0, self.box, 2))[None])

        images, drawn = (1, 5, z, y, x), (1, 2, z, y, x)
        flop = count_flops(self.net, lambda net: evaluate(net, torch.empty(images), lambda k: torch.empty(drawn)))
        return cost(work) | {"flop": flop}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    case, box, field = Case(), Box.of(CORE), NoiseField(0)
    plain = Device("cpu", "float32")
    report = {
        "made_by": "benchmarks/performance.py",
        "emdiffuse_vol": __version__,
        "torch": torch.__version__,
        "hardware": hardware("cpu"),
        "core": CORE,
        "step": plain.step,
        "product_flop_per_second": product(),
        "padded": case.padded(),
        "streamed": {str(step): case.streamed(Sliced("cpu", "float32", step)) for step in STEPS},
        "streamed_bfloat16": case.streamed(Device("cpu", "bfloat16")),
        "noise": cost(lambda: [field.normal(k, 0, box, 2) for k in range(MEMBERS)]),
        "noise_in_torch": cost(lambda: [field._hashed_on("cpu", k, 0, box, 2) for k in range(MEMBERS)]),
        "flop_per_voxel": {str(core): per_voxel(case, core) for core in ((64, 256, 256), (64, 512, 512))},
    }
    out.write_text(json.dumps(rounded(report), indent=2) + "\n")
    print(json.dumps(rounded(report), indent=2))


def per_voxel(case: Case, core: tuple[int, int, int]) -> float:
    """FLOP of a tile over the voxels that it owns."""
    case.sampling = Sampling(MEMBERS, 0, "ancestral", 1, core)
    mode, case.mode = case.mode, isotropic_mode((100, 4096, 4096), (50, 10, 10))
    predictor = case.predictor(Device("cpu", "float32"))
    case.mode = mode
    z, y, x = core
    return predictor.flops() / (z * y * x)


def product() -> float:
    """FLOP/s."""
    a, b = torch.rand(2, SIDE, SIDE)
    spent = cost(lambda: a @ b)
    return 2 * SIDE**3 / (spent["user"] + spent["system"])


def cost(work: Callable[[], Any]) -> Cost:
    """Of a call: seconds of the processor, in the program and in the kernel; pages of memory that were handed out."""
    work()
    found = []
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_SELF)
        work()
        after = resource.getrusage(resource.RUSAGE_SELF)
        names = {"user": "ru_utime", "system": "ru_stime", "page_faults": "ru_minflt"}
        found.append({name: getattr(after, key) - getattr(before, key) for name, key in names.items()})
    return min(found, key=lambda spent: spent["user"] + spent["system"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
