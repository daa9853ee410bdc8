"""Pictures of what the benchmarks measure, from the same stack and the same engine.

    python benchmarks/pictures.py DATA/fib25_val docs/images

``models-x5.png`` and ``models-x10.png`` show a plane cut along z in the middle of the stack: input, truth, linear
interpolation, one of the weights (``--shown``), its uncertainty, and its absolute error in the same colours.
``--published FILE`` shows the published U-Net instead of the input (2e15 FLOP a picture: on a GPU).

``reliability.png`` shows stated against measured coverage on missing planes, for all weights and factors, from mean and
uncertainty alone, with normal quantiles: the stored uncertainty is meant for these.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from predictions import (
    INTERPOLATIONS,
    NM,
    default_methods,
    name_of,
    predict,
    read_stack,
    run_network,
    take_sections,
)

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.metrics.spread import coverage_curve
from emdiffuse_vol.models.checkpoints import EMBEDDED
from emdiffuse_vol.viewing.panels import MARGIN, Panel, comparison_view, draw_panels
from emdiffuse_vol.viewing.reliability import LEVELS, draw_reliability

FACTORS, SHOWN = (4, 5, 6, 8, 10), (5, 10)
COLUMNS, ZOOM = 3, 2  # whole pixels stay sharp, and small to store
COLOURS = 192  # of a picture: greys and one colour map
PUBLISHED = {"members": 2, "sampler": "dpm-solver-2m", "steps": 16}


def draw_xz(path: Path, panels: list[Panel]) -> None:
    pixels = panels[0].image.shape[1]
    draw_panels(path, panels, NM, width=COLUMNS * pixels * ZOOM + (COLUMNS + 1) * MARGIN)
    shrink(path)


def shrink(path: Path) -> None:
    """A palette instead of three channels: a third of the bytes."""
    Image.open(path).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def xz_panels(
    truth: np.ndarray, sections: np.ndarray, factor: int, means: dict[str, np.ndarray], uncertainty: np.ndarray, y: int
) -> list[Panel]:
    """means: [z, y, x] of each method, the last one that of the uncertainty. Where there is room the input is shown."""
    nearest = np.floor(np.arange(len(truth)) / factor + 0.5).astype(int)
    given = sections[nearest, y] if (len(means) + 3) % COLUMNS else None
    cut = {name: mean[:, y] for name, mean in means.items()}
    return comparison_view(truth[:, y], cut, uncertainty[:, y], list(cut)[-1], given)


def published_strip(weights: str, sections: np.ndarray, factor: int, y: int, **settings: Any) -> np.ndarray:
    """The published network on the one row of tiles that the plane lies in; elsewhere the result is 0."""
    half = 14  # the plane's neighbours, as few as the least tile
    height = sections.shape[1]
    roi = Box((0, max(0, y - half), 0), (len(sections), min(height, y + half), sections.shape[2]))
    made = run_network(weights, sections, factor, roi=str(roi), **(PUBLISHED | settings))
    whole = np.zeros(((len(sections) - 1) * factor + 1, *sections.shape[1:]), sections.dtype)
    whole[:, roi.start[1] : roi.stop[1]] = made.mean
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", nargs="+", default=None, help="names or paths; default: all embedded")
    parser.add_argument("--shown", default=EMBEDDED, help="of the weights, in pictures along z")
    parser.add_argument("--factors", nargs="+", type=int, default=FACTORS)
    parser.add_argument("--published", default=None, metavar="FILE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--crop", type=int, default=None, metavar="N", help="a trial: the first N voxels of each axis")
    asked = parser.parse_args()
    stack = read_stack(asked.data)[(slice(asked.crop),) * 3]
    weights = asked.weights or [name for name in default_methods() if name not in INTERPOLATIONS]
    if asked.shown not in weights:
        parser.error(f"--shown {asked.shown} is not among the weights: {', '.join(weights)}")
    curves: dict[str, dict[str, np.ndarray]] = {name_of(name): {} for name in weights}
    for factor in asked.factors:
        sections, truth, missing = take_sections(stack, factor)
        y = stack.shape[1] // 2
        means, uncertainty = {"Linear interpolation": predict("linear", sections, factor).mean}, truth
        if asked.published and factor in SHOWN:
            made = published_strip(asked.published, sections, factor, y, device=asked.device)
            means["Published U-Net"] = made
        for name in weights:
            found = predict(name, sections, factor, device=asked.device)
            assert found.uncertainty is not None
            if name == asked.shown:
                uncertainty, means[name_of(name)] = found.uncertainty, found.mean
            parts = (part[missing] for part in (found.mean, found.uncertainty, truth))
            measured = coverage_curve(*parts, LEVELS)
            curves[name_of(name)][f"×{factor}"] = measured
            print(f"x{factor} {name}: {np.round(measured, 3)}", flush=True)
        if factor in SHOWN:
            draw_xz(asked.folder / f"models-x{factor}.png", xz_panels(truth, sections, factor, means, uncertainty, y))
    draw_reliability(asked.folder / "reliability.png", LEVELS, curves)
    shrink(asked.folder / "reliability.png")


if __name__ == "__main__":
    main()
