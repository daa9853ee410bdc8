"""Downstream: do neurites segmented in a reconstruction agree better with those that people traced?

    python benchmarks/segmentation.py DATA/fib25_val benchmarks/results/segmentation.json

Every R-th section (R = 8) of DATA/fib25_val is kept, each method predicts the rest, and one fixed recipe without
learning segments the truth and each prediction alike:

    boundaries   two parts how strongly a voxel lies on a dark sheet, the largest eigenvalue of the Hessian, and one
                 part how dark it is beside the median grey, each over its 99th percentile; smoothed, and brought to 1
                 at the 95th percentile
    fragments    watershed of the boundary map from its minima that are ``DEPTH`` deep
    merging      the two fragments with the weakest mean boundary between them become one, again and again, while that
                 is below ``WEAK``; boundaries of merged fragments are averaged by their area

Recipe and parameters were chosen by the score of the *truth's* segmentation alone, on the first 140 voxels of each axis
(``--tune --crop 140`` shows that of the last choice), with no prediction in sight.
Scored is the variation of information against the labels, in bits, over all voxels: split (one body in many segments)
and merge (many bodies in one segment). ``gap_closed`` is the share of the distance from linear interpolation to the
truth's own segmentation that a method wins back.
"""

from __future__ import annotations

import argparse
import heapq
import json
from pathlib import Path
from typing import Any

import numpy as np
from predictions import default_methods, heading, name_of, predict, read_labels, read_stack, rounded, take_sections
from scipy import ndimage
from skimage.feature import hessian_matrix, hessian_matrix_eigvals
from skimage.metrics import variation_of_information
from skimage.morphology import local_minima, reconstruction
from skimage.segmentation import watershed

FACTOR = 8
FINE, SHEET, SMOOTH = 1.0, 2.0, 1.0  # voxels, standard deviations
DEPTH, WEAK = 0.1, 0.75
TRIED = {"depth": (0.07, 0.1, 0.15), "weak": (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)}


def boundary_map(image: np.ndarray) -> np.ndarray:
    """Greys [z, y, x] -> float32, about 0 inside and 1 on membranes."""
    greys = image.astype(np.float32)
    dark = np.maximum(np.median(greys) - ndimage.gaussian_filter(greys, FINE), 0)
    hessian = hessian_matrix(greys, sigma=SHEET, order="rc", use_gaussian_derivatives=False)
    sheet = np.maximum(hessian_matrix_eigvals(hessian)[0], 0)
    mixed = 2 * sheet / np.percentile(sheet, 99) + dark / np.percentile(dark, 99)
    smooth = ndimage.gaussian_filter(mixed.astype(np.float32), SMOOTH)
    return np.asarray(smooth / np.percentile(smooth, 95), np.float32)


def fragments(boundary: np.ndarray, depth: float = DEPTH) -> np.ndarray:
    """Labels from 1; every voxel has one."""
    shallow_filled = reconstruction(boundary + np.float32(depth), boundary, method="erosion")
    markers, _ = ndimage.label(local_minima(shallow_filled))
    labels: np.ndarray = watershed(boundary, markers)
    return labels


def contacts(labels: np.ndarray, boundary: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of touching labels [n, 2], faces that they share [n], and the sum of the boundary map over these [n]: of
    each face, the larger of its two voxels."""
    count = int(labels.max()) + 1
    codes, heights = [], []
    for axis in range(labels.ndim):
        a, b = (np.moveaxis(labels, axis, 0)[part].ravel() for part in (slice(None, -1), slice(1, None)))
        p, q = (np.moveaxis(boundary, axis, 0)[part].ravel() for part in (slice(None, -1), slice(1, None)))
        across = np.flatnonzero(a != b)
        a, b = a[across].astype(np.int64), b[across].astype(np.int64)
        codes.append(np.minimum(a, b) * count + np.maximum(a, b))
        heights.append(np.maximum(p[across], q[across]))
    found, place = np.unique(np.concatenate(codes), return_inverse=True)
    faces = np.bincount(place)
    total = np.bincount(place, np.concatenate(heights))
    return np.stack([found // count, found % count], axis=1), faces, total


def merge(labels: np.ndarray, boundary: np.ndarray, weak: float = WEAK) -> np.ndarray:
    pairs, faces, total = contacts(labels, boundary)
    return merge_table(int(labels.max()) + 1, pairs, faces, total, weak)[labels]


def merge_table(count: int, pairs: np.ndarray, faces: np.ndarray, total: np.ndarray, weak: float) -> np.ndarray:
    """Old label -> new label. The weakest contact goes first; ties by label."""
    table = np.arange(count)
    edges: dict[int, dict[int, tuple[float, float]]] = {}
    for (a, b), n, s in zip(pairs.tolist(), faces.tolist(), total.tolist(), strict=True):
        edges.setdefault(a, {})[b] = edges.setdefault(b, {})[a] = (n, s)
    queue = [(s / n, a, b) for a, near in edges.items() for b, (n, s) in near.items() if a < b and s / n < weak]
    heapq.heapify(queue)
    while queue:
        strength, a, b = heapq.heappop(queue)
        n, s = edges.get(a, {}).get(b, (1.0, np.inf))
        if s / n != strength:  # one of the two is gone, or their contact has grown since
            continue
        table[b] = a
        for c, (n, s) in edges.pop(b).items():
            del edges[c][b]
            if c != a:
                m, t = edges[a].get(c, (0.0, 0.0))
                edges[a][c] = edges[c][a] = (n + m, s + t)
                if (s + t) / (n + m) < weak:
                    heapq.heappush(queue, ((s + t) / (n + m), min(a, c), max(a, c)))
    # A label's new one is always smaller, so one pass in rising order resolves chains.
    for label in range(count):
        table[label] = table[table[label]]
    return table


def segment(image: np.ndarray) -> np.ndarray:
    boundary = boundary_map(image)
    return merge(fragments(boundary), boundary)


def agreement(labels: np.ndarray, segments: np.ndarray) -> dict[str, Any]:
    split, merged = (float(v) for v in variation_of_information(labels, segments))
    return {"split": split, "merge": merged, "sum": split + merged, "segments": len(np.unique(segments))}


def tune(truth: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The truth's own score for all parameters that were tried."""
    boundary = boundary_map(truth)
    scores = {}
    for depth in TRIED["depth"]:
        parts = fragments(boundary, depth)
        scores[f"depth {depth}, no merging"] = agreement(labels, parts)
        pairs, faces, total = contacts(parts, boundary)
        for weak in TRIED["weak"]:
            table = merge_table(int(parts.max()) + 1, pairs, faces, total, weak)
            row = agreement(labels, table[parts])
            scores[f"depth {depth}, weak {weak}"] = row
            print(f"depth {depth}, weak {weak}: {rounded(row)}", flush=True)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--methods", nargs="+", default=None, help="default: linear, cubic and all embedded weights")
    parser.add_argument("--factor", type=int, default=FACTOR)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--crop", type=int, default=None, metavar="N", help="a trial: the first N voxels of each axis")
    parser.add_argument("--tune", action="store_true", help="score the truth alone, for the parameters that were tried")
    asked = parser.parse_args()
    cut = (slice(asked.crop),) * 3
    sections, truth, _ = take_sections(read_stack(asked.data)[cut], asked.factor)
    labels = read_labels(asked.data)[cut][: len(truth)]
    written = heading("segmentation.py", asked.data) | {"factor": asked.factor, "shape": truth.shape}
    if asked.tune:
        written["tuning"] = tune(truth, labels)
    else:
        written |= compare(sections, truth, labels, asked.factor, asked.methods or default_methods(), asked.device)
    asked.result.write_text(json.dumps(rounded(written), indent=1) + "\n")


def compare(
    sections: np.ndarray, truth: np.ndarray, labels: np.ndarray, factor: int, methods: list[str], device: str = "auto"
) -> dict[str, Any]:
    rows = {"truth": agreement(labels, segment(truth))}
    print("truth", rounded(rows["truth"]), flush=True)
    for method in methods:
        settings = {} if method in ("linear", "cubic") else {"device": device}
        rows[name_of(method)] = agreement(labels, segment(predict(method, sections, factor, **settings).mean))
        print(method, rounded(rows[name_of(method)]), flush=True)
    if "linear" in rows:
        gap = rows["linear"]["sum"] - rows["truth"]["sum"]
        for row in rows.values():
            row["gap_closed"] = (rows["linear"]["sum"] - row["sum"]) / gap
    parameters = {"fine": FINE, "sheet": SHEET, "smooth": SMOOTH, "depth": DEPTH, "weak": WEAK}
    return {"parameters": parameters, "unit": "bits", "inputs": rows}


if __name__ == "__main__":
    main()
