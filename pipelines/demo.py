"""`make demo`: from nothing to an isotropic volume and a picture of it.

    python pipelines/demo.py FOLDER

The input is a real FIB-SEM stack where ``EMDVOL_DATA`` names a folder that holds ``fib25_val``, else the procedural
phantom. Of an isotropic cube every tenth section is kept; the command a user types does the rest. FOLDER/panels.png
shows the input, linear interpolation, the reconstruction, its uncertainty and the truth, cut along z.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.metrics.image import psnr
from emdiffuse_vol.metrics.interpolation import linear
from emdiffuse_vol.stores.image import open_array, write_array
from emdiffuse_vol.stores.phantom import PhantomVolume
from emdiffuse_vol.viewing.panels import draw_side_view

FACTOR, NM, SIZE = 10, 10.0, 241


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    truth, source = sample_volume()
    sections = truth[::FACTOR]
    path, out = folder / "input.zarr", folder / "iso.zarr"
    for made_before in (path, out):
        shutil.rmtree(made_before, ignore_errors=True)
    write_array(path, sections, (NM * FACTOR, NM, NM))
    command = ["reconstruct", str(path), "--mode", "vEMDiffuse-a", "--out", str(out)]
    print(f"input: {source}, every {FACTOR}th section of {SIZE}\n$ emdvol {' '.join(command)}", flush=True)
    for more in (["--dry-run"], []):
        subprocess.run([sys.executable, "-m", "emdiffuse_vol", *command, *more], check=True)
    mean, codes = open_array(str(out)).read().result()
    interpolated = linear(sections, FACTOR)
    missing = np.arange(SIZE) % FACTOR != 0
    for name, image in (("linear interpolation", interpolated), ("emdvol", mean)):
        print(f"{name}: {psnr(image[missing], truth[missing]):.2f} dB on the missing planes")
    y = SIZE // 2
    draw_side_view(
        folder / "panels.png",
        sections[:, y],
        mean[:, y],
        FACTOR,
        NM,
        uncertainty=codes[:, y] / 8,
        truth=truth[:, y],
    )
    print(f"wrote {out} and {folder / 'panels.png'}")


def sample_volume() -> tuple[np.ndarray, str]:
    """-> isotropic greys [z, y, x] and where they come from."""
    data = Path(os.environ.get("EMDVOL_DATA") or ".") / "fib25_val" / "grayscale_maps"
    if data.is_dir():
        from skimage.io import imread

        volume = np.stack([imread(p) for p in sorted(data.glob("*.png"))[:SIZE]])
        return volume, "FIB-25, Drosophila medulla (CC-BY)"
    shape = (SIZE, 250, 250)
    return PhantomVolume.of(shape, (NM, NM, NM)).read(Box.of(shape)), "procedural phantom"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
