"""What came out of a run, on one page: pictures, reliability, what went wrong, how fast it was, and how it was made.

Convention: :func:`gather` finds the numbers, which are JSON; :func:`write_report` writes them beside the page and draws
it from them and from a few crops. Thresholds and uncertainties of a report are on a grey scale from 0 to 1 (see
``crops.Shown.unit``). Nothing but the ledger, the log of events and crops is read, whatever the size of the volume.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emdiffuse_vol import __version__
from emdiffuse_vol.errors import EmdvolError, OutputError
from emdiffuse_vol.geometry.boxes import Triple
from emdiffuse_vol.reconstruct.ledger import BRIDGED, FAILED, SKIPPED
from emdiffuse_vol.reconstruct.reliability import PUBLISHED, of_blocks
from emdiffuse_vol.reconstruct.status import Status, read_status
from emdiffuse_vol.stores.volume import Volume
from emdiffuse_vol.viewing.charts import check_matplotlib
from emdiffuse_vol.viewing.crops import Shown, choose_point, made_at, open_input, open_truth, sampled_uncertainty
from emdiffuse_vol.viewing.history import History, paced, read_history
from emdiffuse_vol.viewing.methods import methods_paragraph
from emdiffuse_vol.viewing.page import document
from emdiffuse_vol.viewing.report_parts import blocks, looks, opening, plain, provenance, reliability, scored, speed

SIZE = 256
MOST_LISTED = 20
Z90 = 1.645
SLACK = 60.0  # seconds by which clocks of machines and of file systems may differ


@dataclass(frozen=True)
class Asked:
    """at: the point that is shown, None to choose one; size: voxels along an edge of the crops; threshold: of the 99th
    percentile of a block that counts as reliable."""

    input: str | None = None
    truth: str | None = None
    at: Triple | None = None
    size: int = SIZE
    threshold: float = PUBLISHED


def write_report(path: Path, out: Path, asked: Asked, scores: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """-> the page and the JSON file beside it. scores: of ``evaluation.scores.evaluate``.

    Raises OutputError, InputError or GeometryError.
    """
    check_matplotlib()
    shown = Shown(path)
    status, history = read_status(path), read_history(path)
    sections, missing = _sections(shown, asked.input)
    truth = open_truth(shown, asked.truth) if asked.truth else None
    point = choose_point(shown, asked.at)
    voxels = sampled_uncertainty(shown) / np.float32(shown.unit)
    numbers = gather(shown, status, history, asked, voxels, scores) | {
        "point": point,
        "input_shown": sections is not None,
    }
    parts = [
        *opening(numbers),
        *looks(shown, asked.threshold, asked.size, point, sections, missing, truth),
        *scored(numbers),
        *reliability(shown, numbers, voxels),
        *blocks(numbers),
        *speed(shown, numbers, history),
        *provenance(numbers),
    ]
    html = document(f"{numbers['name']}: report", parts)
    as_json = out.with_suffix(".json")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
        as_json.write_text(json.dumps(plain(numbers), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
    return out, as_json


def _sections(shown: Shown, path: str | None) -> tuple[Volume | None, str]:
    """The input, or why it is not shown: a run's input may have been moved; one that was asked for must be there."""
    try:
        return open_input(shown, path), ""
    except EmdvolError as error:
        if path is not None:
            raise
        return None, f"The input is not shown ({error}); give --with where it is now."


def gather(
    shown: Shown,
    status: Status,
    history: History,
    asked: Asked,
    voxels: np.ndarray[Any, np.dtype[np.float32]],
    scores: dict[str, Any] | None,
) -> dict[str, Any]:
    """All that the page says, as JSON values. voxels: sampled uncertainties on the scale from 0 to 1."""
    made, ledger = shown.made, shown.ledger
    written = shown.written()
    p99, means = (of_blocks(field, shown.job, ledger) for field in ("p99", "mean"))
    seconds = ledger.read("seconds")[written]
    uncertainty = made["uncertainty"]
    largest = uncertainty["largest"]
    numbers: dict[str, Any] = {
        "report": {"version": __version__, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
        "output": str(shown.path.absolute()),
        "name": shown.path.name.removesuffix(".zarr"),
        "complete": status.sealed,
        "shape": shown.shape,
        "voxel_size_nm": shown.voxel_size,
        "dtype": shown.mean_volume.spec.dtype,
        "voxels": status.voxels,
        "stages": {stage.name: stage.counts for stage in status.stages},
        "finished_share": status.stages[0].finished / status.stages[0].total,
        "failed_tries": status.tries,
        "failed": _listed(shown, FAILED, history),
        "bridged": _listed(shown, BRIDGED, history),
        "skipped": _listed(shown, SKIPPED, history),
        "damaged_sections": shown.job.damaged,
        "events": history.counts,
        "reliability": {
            "threshold": asked.threshold,
            "published_threshold": PUBLISHED,
            "unit_greys": shown.unit,
            "blocks": int(written.sum()),
            "reliable_blocks": int((p99 < asked.threshold).sum()),
            "reliable_share": _mean(p99 < asked.threshold),
            "block_p99": _quantiles(p99),
            "block_mean": _quantiles(means),
            "largest_that_can_be_stored": largest and largest / shown.unit,
            "calibrated": {
                "scale": uncertainty["scale"],
                "interval": uncertainty["interval"],
                "nominal_coverage": 0.9,
                "measured_coverage": uncertainty["measured_coverage"],
                "half_width_at_threshold": Z90 * asked.threshold,
            },
        },
        "voxel_uncertainty": {
            "sampled_voxels": len(voxels),
            "share_below_threshold": _mean(voxels < asked.threshold),
            **_quantiles(voxels),
        },
        "throughput": {
            "voxels_per_second": history.voxels / history.seconds if history.seconds else None,
            "seconds_at_work": history.seconds,
            "voxels_accounted_for": history.voxels,
            "now_voxels_per_second": status.rate,
            "block_seconds": _quantiles(seconds),
            "over_time": _over_time(shown, history, status.voxels * float(written.mean())),
            "drivers": [vars(stretch) for stretch in history.stretches[-1000:]],
        },
        "scores": scores,
        "provenance": {key: value for key, value in made.items() if key != "job"},  # the fingerprint says it too
    }
    return numbers | {"methods": methods_paragraph(shown, numbers)}


def _over_time(shown: Shown, history: History, voxels: float) -> dict[str, Any] | None:
    """From when files were made, where they still say so; else from what drivers have logged. None if neither."""
    times, start, end = made_at(shown), history.first, history.last
    if (
        start is not None
        and end is not None
        and len(times)
        and times.min() > start - SLACK
        and times.max() < end + SLACK
    ):
        (edges, rates), source = paced(times, start, voxels), "from when blocks were written"
        return {"source": source, "seconds": list(edges - edges[0]), "voxels_per_second": list(rates)}
    if not history.stretches:
        return None
    edges, rates = history.rates()
    source = "averages of drivers that have come to their end"
    return {"source": source, "seconds": list(edges - edges[0]), "voxels_per_second": list(rates)}


def _listed(shown: Shown, state: int, history: History) -> dict[str, Any]:
    """How many, and the first of them."""
    found = np.flatnonzero(shown.ledger.state.ravel() == state)
    some = []
    for index in map(int, found[:MOST_LISTED]):
        entry: dict[str, Any] = {"block": index, "box": str(shown.block_box(index))}
        if state == FAILED:
            entry["error"] = history.errors.get(index, "")
        some.append(entry)
    return {"count": len(found), "first": some}


def _quantiles(values: np.ndarray[Any, Any]) -> dict[str, float | None]:
    names = {"p5": 5, "median": 50, "p95": 95, "p99": 99, "largest": 100}
    if not len(values):
        return {"mean": None, **dict.fromkeys(names)}
    found: dict[str, float | None] = {"mean": float(values.mean(dtype=np.float64))}
    return found | dict(zip(names, map(float, np.percentile(values, list(names.values()))), strict=True))


def _mean(flags: np.ndarray[Any, Any]) -> float | None:
    return float(flags.mean()) if len(flags) else None
