"""What is run: a small input, a network that costs nearly nothing, and the run that nobody strikes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from striking.outputs import file_hashes

TOOL = (sys.executable, "-m", "emdiffuse_vol", "--quiet")


class Bench:
    """A small input, an unbroken run of it, and an output of other settings. ``seconds``: that the unbroken took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.input, self.weights = folder / "in.zarr", folder / "w.safetensors"
        make_input(self.input)
        make_weights(self.weights)
        started = time.monotonic()
        self.make(folder / "unbroken.zarr")
        self.seconds = time.monotonic() - started
        self.reference = file_hashes(folder / "unbroken.zarr")
        self.make(folder / "other.zarr", "--seed", "1")

    def make(self, out: Path, *flags: str) -> None:
        done = subprocess.run(self.command(out, *flags), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"an unbroken run failed:\n{done.stdout}\n{done.stderr}")

    def command(self, out: Path, *flags: str, tool: tuple[str, ...] = TOOL) -> list[str]:
        settings = ["--weights", str(self.weights), "--shard", "64,64,64", "--tile", "64,64,64", "--members", "2"]
        return [*tool, "reconstruct", str(self.input), "--out", str(out), *settings, *flags]


def make_input(path: Path) -> None:
    from emdiffuse_vol.stores.convert import convert
    from emdiffuse_vol.stores.phantom import PhantomVolume

    convert(PhantomVolume.from_url("phantom:5x8x560?voxel_size=50,10,10&seed=0"), path)


def make_weights(path: Path) -> None:
    """Random everywhere: a layer that begins as zeros would hide what lies behind it."""
    import torch

    from emdiffuse_vol.models.checkpoints import save_weights
    from emdiffuse_vol.models.slab import SlabNet

    config = {"width": 4, "deep": 4}
    net, generator = SlabNet(**config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            fan = p[0].numel() if p.ndim > 1 else 100
            p.copy_(torch.randn(p.shape, generator=generator) * (0.03 if "out" in name else 1.2) / fan**0.5)
    save_weights(path, net, architecture="slab", config=config, modes=["vEMDiffuse-a"], gaps=[1.1, 20])
