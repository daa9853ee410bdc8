"""Reliability diagram: how much of the truth the stated intervals hold, against how much they are to hold.

Convention: levels and coverages are shares from 0 to 1, drawn in per cent. On the diagonal an uncertainty is honest;
below it is too small, above it too large.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import OutputError
from emdiffuse_vol.viewing.panels import DPI, INK, PAPER

TITLE = 0.3  # inches
LEVELS: NDArray[np.float64] = np.array([*range(10, 100, 5), 99]) / 100
MARKED = 0.9


def draw_reliability(
    path: str | os.PathLike[str],
    levels: NDArray[Any],
    coverages: Mapping[str, Mapping[str, NDArray[Any]]],
    width: int = 1000,
) -> None:
    """coverages: title of a panel -> name of a curve -> measured coverage at ``levels``, as of
    ``metrics.spread.coverage_curve``. Raises OutputError when matplotlib is missing or the file cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError("drawing needs matplotlib; install it with: pip install 'emdiffuse_vol[view]'") from error

    columns = min(len(coverages), 2 if len(coverages) in (2, 4) else 3)
    rows = -(-len(coverages) // columns)
    side = width / DPI / max(columns, 2)
    figure = Figure(figsize=(columns * side, rows * (side + TITLE)), dpi=DPI, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for place in panels.flat[len(coverages) :]:
        place.set_visible(False)
    for place, (title, curves) in zip(panels.flat, coverages.items(), strict=False):
        place.plot((0, 100), (0, 100), color=INK, lw=1, ls="--", label="honest")
        for name, measured in curves.items():
            place.plot(levels * 100, np.asarray(measured) * 100, marker="o", ms=3, lw=1.5, label=name)
        place.axvline(MARKED * 100, color=INK, lw=0.6, alpha=0.4)
        place.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", title=title)
        place.grid(alpha=0.25)
        place.legend(loc="upper left", frameon=False, fontsize=10)
    figure.supxlabel("stated: share of the truth that mean ± z × uncertainty is to hold, %")
    figure.supylabel("measured, %")
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
