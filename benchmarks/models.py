"""Every method on a volume with a known truth, in one run: how good the mean, the members and the spread are, at what
cost.

    python benchmarks/models.py DATA/fib25_val benchmarks/results/models.json --lpips FOLDER

DATA/fib25_val holds an isotropic stack that no weights were trained on. For each factor R every R-th section is kept,
and each method predicts the rest: linear and cubic interpolation, all embedded weights (or ``--methods``: names and
paths), through the engine that a user runs, default settings. What is scored:

    psnr, ssim, fsim, lpips    the mean, on missing planes (255 = full range; the last two on ``--planes`` of them,
                               evenly spread and the same for all); fsim_member, lpips_member: the first member
    crps                       the members, fair, on missing planes, greys; of interpolation it is the absolute error
    axial_resolution_nm        the mean: 1 / the frequency at which its Fourier shell correlation with the truth, in a
                               cone along z, falls below 1/7; of whole volumes, measured planes included, as missing
                               planes alone have no spectrum along z
    axial_power                the first member: axial over lateral power spectrum, over that of the truth, up to half
                               of the highest frequency, geometric mean (1 is right), and in four bands; whole volumes
    coverage_90, spread_skill  the stored uncertainty on missing planes; spread_skill_members: the members themselves
    seam                       mean difference across faces of tiles along z over that across others at the same
                               distance from a section; seam_error: its standard error where there is no seam

``--published FILE`` adds the published U-Net, whose cost, 8e8 FLOP per voxel, allows for a small part only: the missing
planes between two sections under ``SUBSET``, at one factor. All methods are scored on that part again ("subset").
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lpips_offline import open_lpips
from predictions import (
    NM,
    Prediction,
    default_methods,
    heading,
    name_of,
    predict,
    read_stack,
    rounded,
    run_network,
    take_sections,
)

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.metrics.features import Features, feature_similarity, features
from emdiffuse_vol.metrics.image import score_image
from emdiffuse_vol.metrics.perceptual import Lpips
from emdiffuse_vol.metrics.seams import face_differences, seam
from emdiffuse_vol.metrics.spectra import Shells, axial_correlation, axial_power, relative_power, resolution
from emdiffuse_vol.metrics.spread import fair_crps, score_spread, spread_skill

FACTORS = (4, 5, 6, 8, 10)
PLANES = 24
BANDS = (1 / 16, 1 / 8, 3 / 16, 1 / 4)
# Pixels y and x that one tile of the published network, with its margin, covers: 224 with 16 of blending on each side.
SUBSET = (16, 208)
PUBLISHED: dict[str, dict[str, Any]] = {
    "published, 200 ancestral steps": {"members": 2, "sampler": "ancestral", "steps": 200},
    "published, 16 solver steps": {"members": 2, "sampler": "dpm-solver-2m", "steps": 16},
}


@dataclass
class Reference:
    """A truth [z, y, x], with what is computed of it once for all methods. missing: numbers of the planes scored;
    sample: of those whose features are compared; whole: whether its spectra and seams mean something."""

    truth: np.ndarray
    missing: np.ndarray
    factor: int
    lpips: Lpips | None
    planes: int = PLANES
    whole: bool = True

    @cached_property
    def sample(self) -> np.ndarray:
        chosen = np.linspace(0, len(self.missing) - 1, min(self.planes, len(self.missing))).round().astype(int)
        return self.missing[chosen]

    @cached_property
    def features(self) -> Features:
        return features(self.truth[self.sample])

    @cached_property
    def maps(self) -> Any:
        assert self.lpips
        return self.lpips.features(self.truth[self.sample])

    @cached_property
    def power(self) -> Shells:
        return axial_power(self.truth)


def score(prediction: Prediction, reference: Reference) -> dict[str, Any]:
    missing, sample = reference.missing, reference.sample
    mean, member = prediction.mean, prediction.members[0]
    image = score_image(mean[missing], reference.truth[missing], 255.0)
    row: dict[str, Any] = {
        "psnr": image.psnr,
        "ssim": image.ssim,
        "fsim": float(feature_similarity(features(mean[sample]), reference.features).mean()),
        "fsim_member": float(feature_similarity(features(member[sample]), reference.features).mean()),
    }
    if lpips := reference.lpips:
        row["lpips"] = float(lpips.distance(lpips.features(mean[sample]), reference.maps).mean())
        row["lpips_member"] = float(lpips.distance(lpips.features(member[sample]), reference.maps).mean())
    if reference.whole:
        row["axial_resolution_nm"] = NM * resolution(axial_correlation(mean, reference.truth))
        power = axial_power(member)
        row["axial_power"] = relative_power(power, reference.power)
        row["axial_power_bands"] = [
            relative_power(power, reference.power, a, b) for a, b in zip((0, *BANDS[:-1]), BANDS, strict=True)
        ]
    row |= spread_scores(prediction, reference)
    if reference.whole and "cell" in prediction.facts:
        row |= seam_scores(mean, reference.factor, prediction.facts["cell"][0])
    return row | {key: value for key, value in prediction.facts.items() if key != "cell"}


def spread_scores(prediction: Prediction, reference: Reference) -> dict[str, Any]:
    missing, truth = reference.missing, reference.truth
    members, uncertainty = prediction.members, prediction.uncertainty
    if uncertainty is None:
        return {"crps": float(np.mean([np.abs(members[0, p] - truth[p]).mean() for p in missing]))}
    spread = score_spread(prediction.mean[missing], uncertainty[missing], truth[missing])
    return {
        # Plane by plane: scores are in float64, and planes are equally large.
        "crps": float(np.mean([fair_crps(members[:, p], truth[p]) for p in missing])),
        "coverage_90": spread.coverage,
        "spread_skill": spread.spread_skill,
        "spread_skill_members": spread_skill(members[:, missing], truth[missing]),
    }


def seam_scores(mean: np.ndarray, factor: int, cell: int) -> dict[str, float]:
    """Faces between tiles along z, compared with those at the same distance from a section."""
    differences = face_differences(mean, axis=0)
    faces = range(cell - 1, len(differences), cell)
    if not faces:
        return {}
    phase = np.arange(len(differences)) % factor
    level = np.array([differences[phase == p].mean() for p in range(factor)])
    found = seam(differences / level[phase], faces)
    return {"seam": found.ratio, "seam_error": found.error}


def run_factor(
    stack: np.ndarray, factor: int, methods: list[str], lpips: Lpips | None, planes: int, **settings: Any
) -> tuple[dict[str, Any], dict[str, Prediction]]:
    """The row of a factor, and the part of every prediction that ``subset_box`` names."""
    sections, truth, missing = take_sections(stack, factor)
    reference = Reference(truth, np.flatnonzero(missing), factor, lpips, planes)
    rows, parts = {}, {}
    for method in methods:
        prediction = predict(method, sections, factor, **settings)
        name = name_of(method)
        rows[name] = score(prediction, reference)
        parts[name] = prediction.part(subset_box(sections, factor))
        report(factor, name, rows[name])
    row = {
        "factor": factor,
        "missing_planes": len(reference.missing),
        "planes_of_fsim_and_lpips": len(reference.sample),
        "methods": rows,
    }
    return row, parts


def run_subset(
    stack: np.ndarray,
    factor: int,
    parts: dict[str, Prediction],
    published: str,
    lpips: Lpips | None,
    runs: dict[str, dict[str, Any]] = PUBLISHED,
    **settings: Any,
) -> dict[str, Any]:
    """All methods on the voxels that the published network is run on."""
    sections, truth, _ = take_sections(stack, factor)
    box = subset_box(sections, factor)
    first = box.start[0] // factor
    roi = Box((first, *box.start[1:]), (first + 2, *box.stop[1:]))
    for name, own in runs.items():
        parts[name] = run_network(published, sections, factor, roi=str(roi), **settings | own)
    reference = Reference(truth[box.slices()], np.arange(1, factor), factor, lpips, whole=False)
    rows = {name: score(part, reference) for name, part in parts.items()}
    for name, row in rows.items():
        report(factor, f"subset: {name}", row)
    return {"factor": factor, "box": str(box), "missing_planes": factor - 1, "methods": rows}


def subset_box(sections: np.ndarray, factor: int) -> Box:
    """Output planes from one section to the next, in the middle of the stack, sections included."""
    first = (len(sections) - 1) // 2 * factor
    (a, b), (_, y, x) = SUBSET, sections.shape
    return Box((first, min(a, y), min(a, x)), (first + factor + 1, min(b, y), min(b, x)))


def report(factor: int, name: str, row: dict[str, Any]) -> None:
    shown = {k: round(v, 4) for k, v in row.items() if isinstance(v, float) and k != "flop_per_voxel"}
    print(f"x{factor} {name}: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--methods", nargs="+", default=None, help="default: linear, cubic and all embedded weights")
    parser.add_argument("--factors", nargs="+", type=int, default=FACTORS)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--planes", type=int, default=PLANES, help="of each factor, for FSIM and LPIPS")
    parser.add_argument(
        "--lpips", type=Path, default=None, metavar="FOLDER", help="see lpips_offline.py; without: no LPIPS"
    )
    parser.add_argument("--published", default=None, metavar="FILE", help="checkpoint of the published network")
    parser.add_argument("--published-factor", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--crop", type=int, default=None, metavar="N", help="a trial: the first N voxels of each axis")
    asked = parser.parse_args()
    stack = read_stack(asked.data)[(slice(asked.crop),) * 3]
    lpips = open_lpips(asked.lpips) if asked.lpips else None
    methods = asked.methods or default_methods()
    rows: list[dict[str, Any]] = []
    written = heading("models.py", asked.data) | {"shape": stack.shape, "factors": rows, "subset": None}
    for factor in asked.factors:
        settings = {"members": asked.members, "device": asked.device}
        row, parts = run_factor(stack, factor, methods, lpips, asked.planes, **settings)
        rows.append(row)
        if asked.published and factor == asked.published_factor:
            written["subset"] = run_subset(stack, factor, parts, asked.published, lpips, device=asked.device)
        asked.result.write_text(json.dumps(rounded(written), indent=1) + "\n")


if __name__ == "__main__":
    main()
