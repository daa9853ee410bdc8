"""The mean and the spread of the embedded default on volumes with a known truth, beside linear and cubic interpolation.

    python benchmarks/isotropic.py DATA/fib25_val benchmarks/results/isotropic.json

DATA/fib25_val holds an isotropic stack that no weight was trained on. For each factor R every R-th section is kept, the
stack is reconstructed by the engine a user runs (`emdvol reconstruct`, default settings), and only the missing planes
are scored: PSNR from the pooled squared error (255 = full range), SSIM per plane, coverage of the 90 % interval, spread
over skill, and the seam statistic at the planes where tiles meet. All methods in one run.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.io import imread

from emdiffuse_vol import __version__
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.metrics.image import psnr, ssim
from emdiffuse_vol.metrics.interpolation import cubic, linear
from emdiffuse_vol.metrics.seams import face_differences
from emdiffuse_vol.metrics.spread import score_spread
from emdiffuse_vol.reconstruct.job import Request
from emdiffuse_vol.reconstruct.run import prepare, reconstruct
from emdiffuse_vol.stores.image import create_image, finish, open_array, write_units

FACTORS = (4, 5, 6, 8, 10)
NM = 10.0


def main(data: Path, result: Path) -> None:
    volume = np.stack([imread(path) for path in sorted((data / "grayscale_maps").glob("*.png"))])
    rows = [score(volume, factor) for factor in FACTORS]
    report = {
        "made_by": "benchmarks/isotropic.py",
        "emdiffuse_vol": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU",
        "data": data.name,
        "factors": rows,
    }
    result.write_text(json.dumps(report, indent=2) + "\n")
    for row in rows:
        print({key: value for key, value in row.items() if not isinstance(value, dict)})


def score(volume: np.ndarray, factor: int) -> dict[str, Any]:
    sections = volume[::factor]
    truth = volume[: (len(sections) - 1) * factor + 1]
    missing = np.arange(len(truth)) % factor != 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.zarr"
        create_image(
            str(path), shape=sections.shape, dtype="uint8", voxel_size=(NM * factor, NM, NM), chunk=(16, 64, 64)
        )
        finish(write_units(open_array(str(path), 0, "w"), Box.of(sections.shape), sections))
        request = Request(input=str(path), out=str(Path(folder) / "out.zarr"))
        prepared = prepare(request)
        plan = prepared.summary()
        reconstruct(request)
        mean, codes = open_array(request.out).read().result()
    uncertainty = codes.astype(np.float32) / 8
    methods = {
        "linear": linear(sections, factor)[: len(truth)],
        "cubic": cubic(sections, factor)[: len(truth)],
        "ours": mean,
    }
    scores = {
        name: {"psnr": psnr(image[missing], truth[missing]), "ssim": ssim(image[missing], truth[missing])}
        for name, image in methods.items()
    }
    spread = score_spread(mean[missing], uncertainty[missing], truth[missing])
    # Faces between tiles along z, compared with those at the same distance from a section.
    core = prepared.plan.tiling.core[0]
    differences = face_differences(mean, axis=0)
    phase = np.arange(len(differences)) % factor
    relative = differences / np.array([differences[phase == p].mean() for p in range(factor)])[phase]
    seams = relative[core - 1 :: core]
    row = {
        "factor": factor,
        "gain_db": scores["ours"]["psnr"] - scores["linear"]["psnr"],
        "gain_ssim": scores["ours"]["ssim"] - scores["linear"]["ssim"],
        **scores,
        "coverage_90": spread.coverage,
        "spread_skill": spread.spread_skill,
        "seam_at_tile_faces": float(seams.mean()),
        "seam_scatter_of_other_faces": float(relative.std() / len(seams) ** 0.5),
        "flop_per_voxel": plan["flop_per_voxel_network"],
        "flop_per_voxel_with_overlap": plan["flop_per_voxel"],
    }
    result: dict[str, Any] = rounded(row)
    return result


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return float(f"{float(value):.5g}") if isinstance(value, float | np.floating) else value


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
