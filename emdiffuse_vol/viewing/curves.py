"""Curves of an evaluation, as PNG files: correlation with the truth by frequency, power along z, calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emdiffuse_vol.errors import OutputError
from emdiffuse_vol.viewing.charts import ACCENT, INK, MUTED, drawn, new_figure, styled

COLOURS = {"reconstruction": ACCENT, "linear": MUTED, "truth": INK}
TITLES = {
    "fsc_z": "Fourier shell correlation with the truth, along z",
    "frc_xy": "Fourier ring correlation with the truth, in XY",
    "power_z": "power along z over power along y and x",
}


def draw_scores(scores: dict[str, Any], folder: Path) -> list[Path]:
    """scores: of ``evaluation``, with its detail. Returns files. Raises OutputError where one cannot be written."""
    pictures = {f"{what}.png": _spectrum(what, curve) for what, curve in scores["detail"]["curves"].items()}
    if scores["uncertainty"]:
        pictures["calibration.png"] = _calibration(scores["uncertainty"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in pictures.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}; choose another place") from error
    return [folder / name for name in pictures]


def _spectrum(what: str, curve: dict[str, Any]) -> bytes:
    figure = new_figure(5.4, 3.2)
    place = figure.add_subplot()
    for name, values in curve.items():
        if name != "frequency":
            place.plot(curve["frequency"], values, color=COLOURS[name], label=name)
    if what == "power_z":
        place.set_yscale("log")
    else:
        place.axhline(1 / 7, color=INK, lw=1, ls="--", label="1/7")
        place.set(ylim=(-0.05, 1.05))
    place.set(xlim=(0, 0.5), xlabel="cycles per voxel", title=TITLES[what])
    place.title.set_size(9)
    place.legend(frameon=False, fontsize=8)
    return drawn(styled(figure))


def _calibration(found: dict[str, Any]) -> bytes:
    figure = new_figure(3.4, 3.2)
    place = figure.add_subplot()
    place.plot((0, 1), (0, 1), color=MUTED, lw=1, ls="--")
    place.plot(found["levels"], found["coverage_of_levels"], color=ACCENT, marker="o", ms=3)
    place.set(xlim=(0, 1), ylim=(0, 1), xlabel="stated share of voxels in the interval", ylabel="measured share")
    return drawn(styled(figure))
