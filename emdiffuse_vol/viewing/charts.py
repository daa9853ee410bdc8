"""Pictures of a report as PNG bytes: pixels of volumes one to one, and charts of numbers.

Convention: images are [row, column]; grey panels share the run's greys; uncertainties are drawn from 0 to a threshold,
in colours of a flame, and above it in a colour of their own, the same one in every picture.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emdiffuse_vol.errors import OutputError
from emdiffuse_vol.viewing.history import BROKEN, MADE, OUTSIDE, UNMADE, BlockMap

Pixels = NDArray[np.uint8]
FLAME = "inferno"
OVER, CROSS = "#22d3ee", (255, 170, 0)
KINDS = {BROKEN: ("#d1123f", "failed"), UNMADE: ("#c9ced6", "not made yet"), OUTSIDE: ("#eef0f3", "outside tissue")}
INK, MUTED, ACCENT = "#1f2933", "#6b7280", "#2563a8"
DPI = 160
MOST_BARS = 60


def check_matplotlib() -> None:
    """Raises OutputError where it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise OutputError("a report needs matplotlib; install it with: pip install 'emdiffuse_vol[view]'") from error


def grey(image: NDArray[Any], low: float, high: float) -> Pixels:
    """-> [row, column, 3]"""
    scaled = (image.astype(np.float32) - low) / max(high - low, 1e-6)
    return np.repeat(np.rint(scaled.clip(0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


def flame(uncertainty: NDArray[Any], threshold: float) -> Pixels:
    """-> [row, column, 3]; ``threshold`` in the unit of the uncertainty."""
    colours: Pixels = _flame()(uncertainty / threshold, bytes=True)[..., :3]
    return colours


def orthoview(planes: tuple[Pixels, Pixels, Pixels], places: tuple[int, int, int], z_stretch: float = 1.0) -> Pixels:
    """XY, XZ and YZ through a point as one picture: XZ below XY, YZ turned to its right. places: of the point within
    the crops, z y x, marked by lines. z_stretch: of the z axis, which makes its voxels square."""
    from PIL import Image

    z, y, x = places
    xy, xz, yz = (plane.copy() for plane in planes)
    for image, row, column in ((xy, y, x), (xz, z, x), (yz, z, y)):
        image[row] = (image[row] // 2 + np.array(CROSS) // 2).astype(np.uint8)
        image[:, column] = (image[:, column] // 2 + np.array(CROSS) // 2).astype(np.uint8)
    height = max(1, round(len(xz) * z_stretch))
    xz, yz = (np.asarray(Image.fromarray(image).resize((image.shape[1], height))) for image in (xz, yz))
    gap = max(2, len(xy) // 60)
    page = np.full((len(xy) + gap + height, xy.shape[1] + gap + height, 3), 255, np.uint8)
    page[: len(xy), : xy.shape[1]] = xy
    page[len(xy) + gap :, : xy.shape[1]] = xz
    page[: len(xy), xy.shape[1] + gap :] = yz.transpose(1, 0, 2)
    return page


def png(pixels: Pixels) -> bytes:
    from PIL import Image

    image = Image.fromarray(pixels)
    if (pixels[..., :1] == pixels).all():
        image = image.convert("L")
    return _saved(lambda file: image.save(file, "PNG", optimize=True))


def colour_bar(threshold: float) -> bytes:
    """``threshold`` on the scale from 0 to 1."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure = new_figure(4.4, 0.52)
    figure.set_layout_engine("none")
    place = figure.add_axes((0.03, 0.58, 0.94, 0.34))
    scale = ScalarMappable(Normalize(0, threshold), _flame())
    bar = figure.colorbar(scale, cax=place, orientation="horizontal", extend="max", extendfrac=0.06)
    bar.ax.tick_params(labelsize=8, color=INK, labelcolor=INK, length=3)
    bar.set_ticks(np.linspace(0, threshold, 5), labels=[f"{v:.3g}" for v in np.linspace(0, threshold, 5)])
    bar.outline.set_linewidth(0.5)
    return drawn(figure)


def histogram(values: NDArray[np.float32], threshold: float) -> bytes:
    """Of uncertainties; both on the scale from 0 to 1. What lies far above the threshold is in the last bar."""
    figure = new_figure(5.4, 2.7)
    place = figure.add_subplot()
    most = 1.5 * threshold
    edges = np.linspace(0, most, 61)
    # A little within, so that the last bar holds the rest whatever the rounding.
    counts, _ = np.histogram(values.clip(0, most * (1 - 1e-6)), edges)
    colours = [ACCENT if edge < threshold * (1 - 1e-9) else OVER for edge in edges[:-1]]
    place.bar(edges[:-1], 100 * counts / max(len(values), 1), np.diff(edges), align="edge", color=colours)
    place.axvline(threshold, color=INK, lw=1, ls="--")
    place.text(
        threshold, 0.96, f" threshold {threshold:g}", transform=place.get_xaxis_transform(), va="top", fontsize=8
    )
    place.set(xlim=(0, most), xlabel="uncertainty of a voxel, grey scale 0–1", ylabel="% of voxels")
    return drawn(styled(figure))


@dataclass(frozen=True)
class Extent:
    """Of a map, downwards and rightwards, in µm: whole, and of one cell; cells at the end may be cut."""

    whole: tuple[float, float]
    cell: tuple[float, float]

    def middle(self, axis: int, index: int) -> float:
        return (index * self.cell[axis] + min((index + 1) * self.cell[axis], self.whole[axis])) / 2


def block_maps(maps: dict[str, tuple[BlockMap, Extent]], threshold: float) -> bytes:
    """axes downwards and rightwards, as "yx" -> map of p99 on the scale from 0 to 1."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    widths = [max(0.45, min(2.2, extent.whole[1] / extent.whole[0])) for _, extent in maps.values()]
    figure = new_figure(6.6, 3.3)
    places = figure.subplots(1, len(maps), squeeze=False, width_ratios=widths)[0]
    for place, (axes, (shown, extent)) in zip(places, maps.items(), strict=True):
        image = _flame()(np.nan_to_num(shown.worst) / threshold)[..., :3]
        for kind, (colour, _) in KINDS.items():
            image[shown.kind == kind] = to_rgb(colour)
        (height, width), (rows, columns) = extent.cell, shown.kind.shape
        place.imshow(image, extent=(0, columns * width, rows * height, 0), aspect="equal", interpolation="nearest")
        place.set(xlim=(0, extent.whole[1]), ylim=(extent.whole[0], 0))
        place.tick_params(labelsize=8)
        place.set_xlabel(f"{axes[1]}, µm", fontsize=9)
        place.set_ylabel(f"{axes[0]}, µm", fontsize=9)
        if max(rows, columns) <= 40:
            for row in range(1, rows):
                place.axhline(row * height, color="white", lw=0.6)
            for column in range(1, columns):
                place.axvline(column * width, color="white", lw=0.6)
        if max(rows, columns) <= 8:
            _write_numbers(place, shown, threshold, extent)
        else:
            _cross_out(place, shown, extent)
    kinds = sorted({int(k) for shown, _ in maps.values() for k in np.unique(shown.kind)} - {MADE})
    patches = [Patch(color=KINDS[k][0], label=KINDS[k][1]) for k in kinds]
    if any((shown.worst > threshold).any() for shown, _ in maps.values()):
        patches.append(Patch(color=OVER, label=f"above {threshold:g}"))
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8)
    return drawn(figure)


def _cross_out(place: Any, shown: BlockMap, extent: Extent, most: int = 500) -> None:
    """A cross on cells with failed blocks, which may be single ones among a hundred thousand."""
    from matplotlib.patheffects import withStroke

    cells = np.argwhere(shown.kind == BROKEN)[:most]
    if len(cells):
        x, y = ([extent.middle(axis, int(cell[axis])) for cell in cells] for axis in (1, 0))
        marks = place.scatter(x, y, s=26, marker="x", color=KINDS[BROKEN][0], linewidths=1.6)
        marks.set_path_effects([withStroke(linewidth=3.2, foreground="white")])


def _write_numbers(place: Any, shown: BlockMap, threshold: float, extent: Extent) -> None:
    for (row, column), value in np.ndenumerate(shown.worst):
        if shown.kind[row, column] == MADE:
            colour = "white" if value < 0.6 * threshold else "black"
            x, y = extent.middle(1, column), extent.middle(0, row)
            place.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=7, color=colour)


def throughput(edges: NDArray[np.float64], rates: NDArray[np.float64]) -> bytes:
    """edges: in seconds; rates: voxels per second between them."""
    figure = new_figure(5.4, 2.4)
    place = figure.add_subplot()
    span = edges[-1] - edges[0]
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
    unit, name = next((u, n) for u, n in units if span > 2 * u or u == 1)
    size, rate_name = (1e6, "Mvoxel/s") if rates.max() >= 1e5 else (1e3, "kvoxel/s")
    place.stairs(rates / size, (edges - edges[0]) / unit, fill=True, color=ACCENT, alpha=0.35)
    place.stairs(rates / size, (edges - edges[0]) / unit, color=ACCENT)
    place.set(xlim=(0, span / unit), ylim=(0, None), xlabel=f"{name} since the first start", ylabel=rate_name)
    return drawn(styled(figure))


def block_seconds(seconds: NDArray[np.float32]) -> bytes:
    figure = new_figure(5.4, 2.4)
    place = figure.add_subplot()
    bars = int(min(MOST_BARS, max(8, np.sqrt(len(seconds)))))
    counts, edges = np.histogram(seconds, bars, (0, max(1e-3, float(np.percentile(seconds, 99.8)) * 1.05)))
    place.bar(edges[:-1], counts, np.diff(edges), align="edge", color=ACCENT)
    place.set(xlim=(0, edges[-1]), xlabel="seconds for a block, reading and writing included", ylabel="blocks")
    return drawn(styled(figure))


def _flame() -> Any:
    from matplotlib import colormaps

    return colormaps[FLAME].with_extremes(over=OVER)


def new_figure(width: float, height: float) -> Any:
    """Inches. No windows, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def styled(figure: Any) -> Any:
    for place in figure.axes:
        place.spines[["top", "right"]].set_visible(False)
        place.tick_params(labelsize=8, color=MUTED, labelcolor=INK)
        place.xaxis.label.set_size(9)
        place.yaxis.label.set_size(9)
        place.grid(axis="y", alpha=0.25)
        place.set_axisbelow(True)
    return figure


def drawn(figure: Any) -> bytes:
    return _saved(lambda file: figure.savefig(file, format="png", dpi=DPI))


def _saved(write: Any) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()
