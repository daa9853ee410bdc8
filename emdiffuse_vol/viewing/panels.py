"""Side views of a reconstruction as one PNG: input, linear interpolation, mean, uncertainty and truth.

Convention: images are [z, x] on the output grid, the z axis pointing down, square pixels of ``pixel_nm``; sections are
[s, x]. All grey panels share one grey scale. Pixels of the page are laid out here, not by the drawing library, so the
picture has the width asked for and panels of equal size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, log, log10
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import OutputError
from emdiffuse_vol.metrics.interpolation import linear

Greys = NDArray[Any]

MARGIN, STRIP = 16, 36  # pixels around panels, and above each for its title
DPI = 100
INK, PAPER = "#1c1c1c", "white"
ASPECT = 1.5  # width over height of a page that reads well


@dataclass(frozen=True)
class Panel:
    """image [z, x], or [z, x, 3] of colours from 0 to 1; limits: what is drawn in the first and the last colour; bar:
    draw a colour bar, in ``unit``."""

    title: str
    image: Greys
    limits: tuple[float, float]
    colours: str = "gray"
    bar: bool = False
    unit: str = "grey levels"


def draw_side_view(
    path: str | os.PathLike[str],
    sections: Greys,
    mean: Greys,
    factor: Fraction | int,
    pixel_nm: float,
    *,
    uncertainty: Greys | None = None,
    truth: Greys | None = None,
    width: int = 1400,
) -> None:
    """Write the PNG. sections: [s, x] measured ones; mean, uncertainty, truth: [z, x], z = number of output planes;
    uncertainty in grey levels. Raises OutputError when matplotlib is missing or the file cannot be written."""
    draw_panels(path, side_view(sections, mean, factor, uncertainty, truth), pixel_nm, width)


def side_view(
    sections: Greys, mean: Greys, factor: Fraction | int, uncertainty: Greys | None = None, truth: Greys | None = None
) -> list[Panel]:
    planes = len(mean)
    low, high = (float(p) for p in np.percentile(mean, (0.2, 99.8)))
    limits = (low, max(high, low + 1))
    # Each section as thick as its distance to the next: what a viewer shows of the input.
    nearest = np.floor(np.arange(planes) / float(factor) + 0.5).astype(int).clip(0, len(sections) - 1)
    panels = [
        Panel(f"Input: a section every {float(factor):.4g} planes", sections[nearest], limits),
        Panel("Linear interpolation", linear(sections[:, None], factor)[:planes, 0], limits),
        Panel("Reconstruction", mean, limits),
    ]
    if uncertainty is not None:
        most = max(1.0, float(np.percentile(uncertainty, 99.8)))
        panels.append(Panel("Uncertainty", uncertainty, (0.0, most), "inferno", bar=True))
    if truth is not None:
        panels.append(Panel("Truth", truth[:planes], limits))
    return panels


def comparison_view(
    truth: Greys, predictions: Mapping[str, Greys], uncertainty: Greys, chosen: str, sections: Greys | None = None
) -> list[Panel]:
    """Truth and predictions [z, x], then the uncertainty of one of them, ``chosen``, and its absolute error in the same
    colours. sections: [z, x] what was measured, as thick as it is shown, for a panel before the others."""
    low, high = (float(p) for p in np.percentile(truth, (0.2, 99.8)))
    limits = (low, max(high, low + 1))
    error = np.abs(predictions[chosen].astype(np.float32) - truth)
    most = max(1.0, float(np.percentile(np.stack([uncertainty, error]), 99)))
    shown = ({} if sections is None else {"Input": sections}) | {"Truth": truth} | dict(predictions)
    return [Panel(title, image, limits) for title, image in shown.items()] + [
        Panel("Uncertainty", uncertainty, (0.0, most), "inferno", bar=True),
        Panel("Absolute error", error, (0.0, most), "inferno", bar=True),
    ]


def draw_panels(path: str | os.PathLike[str], panels: list[Panel], pixel_nm: float, width: int = 1400) -> None:
    """Panels of one shape, in as many columns as make the page well shaped."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError("drawing needs matplotlib; install it with: pip install 'emdiffuse_vol[view]'") from error

    shape = panels[0].image.shape[:2]
    assert all(p.image.shape[:2] == shape for p in panels), "panels of one picture have one shape"
    columns, (w, h) = _layout(len(panels), shape, width)
    rows = ceil(len(panels) / columns)
    height = rows * (h + STRIP) + (rows - 1) * MARGIN // 2 + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)

    def axes(left: float, top: float, w: float, h: float) -> Any:
        return figure.add_axes((left / width, 1 - (top + h) / height, w / width, h / height))

    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        left, top = MARGIN + column * (w + MARGIN), row * (h + STRIP + MARGIN // 2) + STRIP
        place = axes(left, top, w, h)
        low, high = panel.limits
        drawn = place.imshow(panel.image, cmap=panel.colours, vmin=low, vmax=high, aspect="auto")
        place.set_axis_off()
        figure.text(left / width, 1 - (top - 10) / height, panel.title, fontsize=12, color=INK, va="baseline")
        if panel.bar:
            _colour_bar(figure, axes(left + w - 214, top - 19, 100, 10), drawn, panel)
        _scale_bar(place, shape, w, pixel_nm)
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def bar_length(field_nm: float) -> float:
    """1, 2 or 5 times a power of ten, at most a quarter of the field."""
    decade = 10.0 ** floor(log10(field_nm / 4))
    return max(step * decade for step in (1, 2, 5) if step * decade <= field_nm / 4)


def _layout(count: int, shape: tuple[int, ...], width: int) -> tuple[int, tuple[int, int]]:
    """Columns, and size of a panel in page pixels."""

    def size(columns: int) -> tuple[int, int]:
        w = (width - MARGIN * (columns + 1)) // columns
        return w, max(1, round(w * shape[0] / shape[1]))

    def badness(columns: int) -> float:
        return abs(log(width / (ceil(count / columns) * (size(columns)[1] + STRIP)) / ASPECT))

    best = min(range(1, count + 1), key=badness)
    return best, size(best)


def _colour_bar(figure: Any, place: Any, drawn: Any, panel: Panel) -> None:
    figure.colorbar(drawn, cax=place, orientation="horizontal")
    place.set_xticks([])
    place.text(-0.04, 0.5, f"{panel.limits[0]:.3g}", transform=place.transAxes, ha="right", va="center", fontsize=10)
    label = f"{panel.limits[1]:.3g} {panel.unit}".rstrip()
    place.text(1.04, 0.5, label, transform=place.transAxes, ha="left", va="center", fontsize=10)


def _scale_bar(place: Any, shape: tuple[int, ...], panel_pixels: int, pixel_nm: float) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    length = bar_length(shape[1] * pixel_nm)
    unit = shape[1] / panel_pixels  # image pixels in a page pixel
    left, bottom = 12 * unit, shape[0] - 12 * unit
    place.add_patch(
        Rectangle((left, bottom - 5 * unit), length / pixel_nm, 5 * unit, fc="white", ec=INK, lw=0.8, zorder=3)
    )
    label = f"{length / 1000:g} µm" if length >= 1000 else f"{length:g} nm"
    text = place.text(left, bottom - 9 * unit, label, color="white", fontsize=10, va="bottom", zorder=3)
    text.set_path_effects([withStroke(linewidth=2, foreground=INK)])
