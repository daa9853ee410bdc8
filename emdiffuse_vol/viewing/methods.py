"""A paragraph for the methods section of a paper, from what an output says of itself. It claims nothing else."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from emdiffuse_vol.modes import stages_of
from emdiffuse_vol.viewing.crops import Shown

CITATION = "EMDiffuse (Lu et al., Nature Communications 15:4677, 2024)"


def methods_paragraph(shown: Shown, numbers: dict[str, Any]) -> str:
    """numbers: of ``report.gather``."""
    made, job = shown.made, shown.job
    origin, uncertainty = made["provenance"], made["uncertainty"]
    weights, sha256 = origin["weights"], origin["weights"]["sha256"][:16]
    training = weights.get("training")
    first, then = stages_of(job.mode)
    version, trained = origin["software"]["emdiffuse_vol"], ""
    if isinstance(training, dict) and training.get("data"):
        trained = f", trained on {training['data']}"
    steps = f"{job.steps} step{'s' if job.steps != 1 else ''}"
    sentences = [
        f"The volume, {job.input_shape[0]} sections with voxels of {_nm(job.input_identity['voxel_size'])} nm "
        f"(z, y, x), was {'resampled' if then else 'restored'} to voxels of {_nm(shown.voxel_size)} nm with emdvol "
        f"{version} in mode {job.mode}, after {CITATION}"
        + (f": {job.factor} output planes per section." if then else ", section by section."),
    ]
    if before := origin.get("first_weights"):
        sentences.append(
            f"Sections were first restored with the network {before['name']} (SHA-256 {before['sha256'][:16]}…), and "
            f"their uncertainty was carried on by the members."
        )
    sentences.append(
        f"{'Missing planes' if then else 'Sections'} were predicted with the network {weights['name']} (SHA-256 "
        f"{sha256}…{trained}; sampler {job.sampler}, {steps}); grey values are the mean of {job.members} members, seed "
        f"{job.seed}."
    )
    if not first and Fraction(job.factor).denominator == 1:
        sentences.append("Measured sections were copied unchanged.")
    sentences.append(
        f"One affine map of greys ({job.greys[0]:g} to {job.greys[1]:g}) was used for the whole volume, and noise was "
        "keyed by position, so the result does not depend on how the volume was divided."
    )
    if job.inverted:
        sentences.append("Contrast was inverted for the network, and back after it.")
    if job.section_greys[0]:
        sentences.append(
            "For the network, mean and contrast of each section were brought to the running median of its neighbours; "
            "between sections this was undone by interpolation."
        )
    if job.damaged:
        n = len(job.damaged)
        sentences.append(
            f"{n} damaged section{'s were' if n != 1 else ' was'} left out and bridged from the good sections around."
        )
    sentences.append(_uncertainty(uncertainty, numbers))
    if scores := numbers["scores"]:
        sentences.append(_scores(scores))
    software = ", ".join(f"{name} {origin['software'][name]}" for name in ("torch", "numpy", "tensorstore"))
    sentences.append(f"Computation used {job.device} in {job.precision} with {software}.")
    if not numbers["complete"]:
        sentences.append(f"[The run is not complete: {numbers['finished_share']:.1%} of its blocks are finished.]")
    return " ".join(sentences)


def _uncertainty(uncertainty: dict[str, Any], numbers: dict[str, Any]) -> str:
    found = numbers["reliability"]
    said = "The uncertainty of a voxel is the standard deviation of the members"
    if (coverage := uncertainty["measured_coverage"]) is not None:
        said += (
            f", times {uncertainty['scale']:.3g} by calibration (mean ± 1.645 × uncertainty held the truth in "
            f"{coverage:.1%} of voxels of the calibration data, nominally 90 %)"
        )
    else:
        said += ", which was not calibrated for this factor"
    if found["reliable_share"] is not None:
        said += (
            f"; {found['reliable_share']:.1%} of {found['blocks']:,} blocks had a 99th percentile of the uncertainty "
            f"below {found['threshold']:g} on a grey scale from 0 to 1"
        )
    return said + "."


def _scores(scores: dict[str, Any]) -> str:
    ours = scores["reconstruction"]
    said = (
        f"Against a reference volume the predicted planes reached a PSNR of {ours['psnr']:.2f} dB and an SSIM of "
        f"{ours['ssim']:.3f}"
    )
    if linear := scores.get("linear"):
        said += f" (linear interpolation: {linear['psnr']:.2f} dB, {linear['ssim']:.3f})"
    return said + "."


def _nm(size: Any) -> str:
    return " × ".join(f"{s:.6g}" for s in size)
