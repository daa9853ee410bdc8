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
from emdiffuse_vol.viewing.panels import MARGIN, STRIP, _layout, bar_length, draw_side_view, side_view

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
