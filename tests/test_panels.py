"""Side views: a PNG of the width asked for, whose panels show something."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emdiffuse_vol.errors import OutputError
from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.metrics.interpolation import linear
from emdiffuse_vol.stores.phantom import phantom
from emdiffuse_vol.viewing.panels import MARGIN, STRIP, _layout, bar_length, comparison_view, draw_side_view, side_view
from emdiffuse_vol.viewing.reliability import LEVELS, draw_reliability

FACTOR = 5
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """sections, mean, uncertainty, truth of an XZ plane."""
    truth = phantom(Box((0, 40, 0), (51, 41, 120)), (8, 8, 8))[:, 0]
    sections = truth[::FACTOR]
    mean = (linear(sections[:, None], FACTOR)[:, 0] + truth) / 2
    return sections, mean, np.abs(mean - truth), truth


def test_png_has_its_width_and_panels_are_not_constant(tmp_path: Path, arrays: Arrays) -> None:
    pytest.importorskip("matplotlib")
    sections, mean, uncertainty, truth = arrays
    draw_side_view(tmp_path / "side.png", sections, mean, FACTOR, 8, uncertainty=uncertainty, truth=truth)
    page = np.asarray(Image.open(tmp_path / "side.png").convert("RGB")).astype(int)
    assert page.shape[1] == 1400
    columns, (w, h) = _layout(5, mean.shape, 1400)
    for i in range(5):
        row, column = divmod(i, columns)
        left, top = MARGIN + column * (w + MARGIN), row * (h + STRIP + MARGIN // 2) + STRIP
        panel = page[top + 2 : top + h - 2, left + 2 : left + w - 2]
        assert panel.shape == (h - 4, w - 4, 3)
        assert panel.std() > 10
        coloured = np.ptp(panel, axis=2).max() > 60
        assert coloured == (i == 3)


def test_input_rows_are_sections_centred_on_their_planes(arrays: Arrays) -> None:
    sections, mean, _, _ = arrays
    shown = side_view(sections, mean, FACTOR)[0].image
    assert shown.shape == mean.shape
    for plane in (0, 5, 7, 8, 12, 50):
        np.testing.assert_array_equal(shown[plane], sections[round(plane / FACTOR)])


def test_without_uncertainty_and_truth_there_are_three_panels(arrays: Arrays) -> None:
    assert len(side_view(arrays[0], arrays[1], FACTOR)) == 3


@pytest.mark.parametrize(("field", "bar"), [(1000, 200), (3999, 500), (4000, 1000), (8.5, 2)])
def test_scale_bars_are_round(field: float, bar: float) -> None:
    assert bar_length(field) == bar


def test_missing_matplotlib_is_one_line(tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OutputError, match=r"emdiffuse_vol\[view\]"):
        draw_side_view(tmp_path / "side.png", arrays[0], arrays[1], FACTOR, 8)


def test_comparison_shows_error_and_uncertainty_in_the_same_colours(arrays: Arrays) -> None:
    sections, mean, uncertainty, truth = arrays
    straight = linear(sections[:, None], FACTOR)[:, 0]
    shown = comparison_view(truth, {"Linear": straight, "Ours": mean}, uncertainty, "Ours", truth)
    assert [panel.title for panel in shown] == ["Input", "Truth", "Linear", "Ours", "Uncertainty", "Absolute error"]
    assert len({panel.limits for panel in shown[:4]}) == 1
    assert shown[4].limits == shown[5].limits
    np.testing.assert_allclose(shown[5].image, np.abs(mean - truth), atol=1e-4)
    assert len(comparison_view(truth, {"Ours": mean}, uncertainty, "Ours")) == 4


@pytest.mark.parametrize("panels", [1, 2, 4, 5])
def test_reliability_diagram_has_a_panel_for_each_of_the_weights(tmp_path: Path, panels: int) -> None:
    pytest.importorskip("matplotlib")
    low, high = LEVELS * 0.8, np.minimum(LEVELS * 1.05, 1)
    curves = {f"weights {i}": {"×5": low, "×10": high} for i in range(panels)}
    draw_reliability(tmp_path / "reliability.png", LEVELS, curves, width=600)
    page = np.asarray(Image.open(tmp_path / "reliability.png").convert("RGB")).astype(int)
    assert page.shape[1] == {1: 300, 2: 600, 4: 600, 5: 600}[panels]
    coloured = np.ptp(page, axis=2) > 60
    assert coloured.sum() > 300 * panels  # two lines in each


def test_reliability_without_matplotlib_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OutputError, match=r"emdiffuse_vol\[view\]"):
        draw_reliability(tmp_path / "reliability.png", LEVELS, {"weights": {"×5": LEVELS}})
