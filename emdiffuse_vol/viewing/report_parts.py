"""The parts of a report's page, from its numbers and from a few crops.

Convention: ``numbers`` are those of ``report.gather``. Every part is a list of elements, a heading first.
"""

from __future__ import annotations

import json
from math import isfinite
from typing import Any

import numpy as np

from emdiffuse_vol.geometry.boxes import Box, Triple
from emdiffuse_vol.stores.volume import Volume
from emdiffuse_vol.viewing import charts, page
from emdiffuse_vol.viewing.crops import Shown, before, slab
from emdiffuse_vol.viewing.history import BlockMap, History, project
from emdiffuse_vol.viewing.panels import bar_length

PLANES = {"XY": 0, "XZ": 1, "YZ": 2}  # name -> axis across it
NOTEWORTHY = ("retry", "failed", "out of memory", "waiting", "no workers")
Floats = np.ndarray[Any, np.dtype[np.float32]]


def opening(numbers: dict[str, Any]) -> list[page.Html]:
    made, reliability, rate = numbers["provenance"], numbers["reliability"], numbers["throughput"]
    weights = made["provenance"]["weights"]["name"]
    under = (
        f"{times(numbers['shape'])} voxels (z, y, x) of {times(numbers['voxel_size_nm'])} nm, {numbers['dtype']}, "
        f"made by {made['fingerprint']['mode']} with {weights}, factor {made['geometry']['factor']} along z"
    )
    parts = [page.element("h1", numbers["name"]), page.element("p", under, cls="under")]
    blocks = numbers["stages"]["blocks"]
    if not numbers["complete"]:
        said = f"This run is not complete: {numbers['finished_share']:.1%} of its blocks are finished"
        said += f", {blocks['failed']:,} failed and set aside" if blocks["failed"] else ""
        parts.append(page.element("p", f"{said}. What is not made yet is black.", cls="note"))
    coverage, pace = reliability["calibrated"]["measured_coverage"], rate["voxels_per_second"]
    facts = [
        ("complete" if numbers["complete"] else f"{numbers['finished_share']:.1%}", "of the run"),
        (share(reliability["reliable_share"]), f"of blocks reliable (99th percentile < {reliability['threshold']:g})"),
        (share(coverage), "of the truth in 90 % intervals, at calibration"),
        (f"{scaled(pace)}voxel/s" if pace else "not known", "while at work, all drivers"),
        (
            " / ".join(f"{blocks[name]:,}" for name in ("failed", "skipped", "bridged")),
            "blocks failed / skipped / bridged",
        ),
    ]
    return [*parts, page.cards(facts)]


def looks(
    shown: Shown,
    threshold: float,
    size: int,
    point: Triple,
    sections: Volume | None,
    missing: str,
    truth: Volume | None,
) -> list[page.Html]:
    """missing: why there are no sections."""
    _, t = shown.axial.locate(shown.planes(slab(point, shown.shape, 0, 1)))
    away = float(min(t[0], 1 - t[0])) * shown.job.gap * shown.voxel_size[0]
    where = (
        f"Through voxel z={point[0]}, y={point[1]}, x={point[2]}. All grey pictures share one grey scale. The XY plane "
        + (f"is predicted; it lies {away:.3g} nm from the nearest section." if away else "is a measured section.")
    )
    parts = [page.element("h2", "Before and after, at full resolution"), page.element("p", where)]
    if missing:
        parts.append(page.element("p", missing, cls="note"))
    greys, flames = [], []
    for name, axis in PLANES.items():
        box = slab(point, shown.shape, axis, size)
        images = _images(shown, box, axis, threshold, sections, truth)
        greys.append(images["Reconstruction"])
        flames.append(images["Uncertainty"])
        rows_nm, columns_nm = (
            n * s for i, (n, s) in enumerate(zip(box.shape, shown.voxel_size, strict=True)) if i != axis
        )
        length = bar_length(columns_nm)
        bar = length / columns_nm, f"{length / 1000:g} µm" if length >= 1000 else f"{length:g} nm"
        drawn = [
            page.picture(
                charts.png(image), f"{name}, {title}", title=name, more=title, bar=bar, aspect=columns_nm / rows_nm
            )
            for title, image in images.items()
        ]
        parts.append(page.row(drawn, f"repeat({max(4, len(drawn))}, minmax(0, 1fr))"))
    unit = "greys / 255" if shown.unit == 255 else f"greys / {shown.unit:.4g}, the contrast of the volume"
    legend = f"on a grey scale 0–1 ({unit}); light blue: above the threshold {threshold:g}"
    parts.append(page.picture(charts.colour_bar(threshold), "colours", title="Uncertainty", more=legend, width="440px"))
    places = tuple(p - min(slab(point, shown.shape, across, size).start[axis] for across in _others(axis))
                   for axis, p in enumerate(point))  # fmt: skip
    stretch = shown.voxel_size[0] / shown.voxel_size[2]
    views = [
        page.picture(
            charts.png(charts.orthoview((planes[0], planes[1], planes[2]), (places[0], places[1], places[2]), stretch)),
            title,
            title=title,
            more=more,
        )
        for title, planes, more in (
            ("Reconstruction", greys, "XY, to its right YZ, below it XZ"),
            ("Uncertainty", flames, "the same planes"),
        )
    ]
    return [*parts, page.element("h2", "Orthogonal views through that point"), page.row(views)]


def _images(
    shown: Shown, box: Box, axis: int, threshold: float, sections: Volume | None, truth: Volume | None
) -> dict[str, charts.Pixels]:
    """title -> a plane across ``axis``."""
    low, high = shown.job.greys
    images = {}
    if sections is not None:
        nearest, linear = before(shown, sections, box)
        images["Input, nearest section"] = charts.grey(nearest.squeeze(axis), low, high)
        images["Linear interpolation"] = charts.grey(linear.squeeze(axis), low, high)
    images["Reconstruction"] = charts.grey(shown.mean(box).squeeze(axis), low, high)
    images["Uncertainty"] = charts.flame(shown.uncertainty(box).squeeze(axis), threshold * shown.unit)
    if truth is not None:
        images["Truth"] = charts.grey(truth.read(box).squeeze(axis), low, high)
    return images


def _others(axis: int) -> list[int]:
    return [i for i in range(3) if i != axis]


def scored(numbers: dict[str, Any]) -> list[page.Html]:
    scores = numbers["scores"]
    if not scores:
        return []
    ours, linear, spread = scores["reconstruction"], scores.get("linear"), scores.get("uncertainty")
    rows: list[tuple[str, str, str]] = [("reconstruction", f"{ours['psnr']:.2f}", f"{ours['ssim']:.3f}")]
    if linear:
        rows.append(("linear interpolation", f"{linear['psnr']:.2f}", f"{linear['ssim']:.3f}"))
        rows.append(("gain", f"{scores['gain']['psnr']:+.2f}", f"{scores['gain']['ssim']:+.3f}"))
    parts = [
        page.element("h2", "Scores against the truth"),
        page.element(
            "p",
            f"On the {scores['planes']['missing']:,} predicted planes of {scores['planes']['common']:,}, "
            f"{scores['voxels']:,} voxels.",
        ),
        page.table(rows, ("", "PSNR, dB", "SSIM"), numbers=(1, 2)),
    ]
    if spread:
        parts.append(
            page.element(
                "p",
                f"The 90 % intervals hold {spread['coverage']:.1%} of the true voxels; the uncertainty is "
                f"{spread['spread_skill']:.2f} times the error (root mean squares; 1 is honest).",
            )
        )
    return parts


def reliability(shown: Shown, numbers: dict[str, Any], voxels: Floats) -> list[page.Html]:
    """voxels: sampled uncertainties."""
    found, sampled = numbers["reliability"], numbers["voxel_uncertainty"]
    threshold = found["threshold"]
    parts = [page.element("h2", "Reliability")]
    if not found["blocks"]:
        return [*parts, page.element("p", "No block is made yet.")]
    parts += [page.element("p", _counted(found)), page.element("p", _calibrated(numbers))]
    state, p99 = shown.ledger.state, shown.ledger.read("p99") / np.float32(found["unit_greys"])
    maps = {axes: _map(shown, state, p99, axis) for axes, axis in (("yx", 0), ("zx", 1))}
    step = max(max(seen.step) for seen, _ in maps.values())
    cells = f" in cells of {step} × {step}" if step > 1 else ""
    below = share(sampled["share_below_threshold"])
    drawn = [
        page.picture(
            charts.block_maps(maps, threshold),
            "map of the blocks",
            title="99th percentile per block",
            more=f"the worst of the blocks behind each other{cells}; colours as above",
        ),
        page.picture(
            charts.histogram(voxels, threshold),
            "histogram of the uncertainty",
            title="Uncertainty of voxels",
            more=f"{sampled['sampled_voxels']:,} predicted ones, spread over the volume; {below} below the threshold",
        ),
    ]
    parts.append(page.row(drawn, "minmax(0, 6fr) minmax(0, 5fr)"))
    kinds = {
        "voxels (sample)": sampled,
        "blocks: mean": found["block_mean"],
        "blocks: 99th percentile": found["block_p99"],
    }
    rows = [
        (name, *(f"{values[key]:.4f}" for key in ("mean", "median", "p95", "p99", "largest")))
        for name, values in kinds.items()
        if values["mean"] is not None
    ]
    return [*parts, page.table(rows, ("", "mean", "median", "95 %", "99 %", "largest"), numbers=range(1, 6))]


def _map(shown: Shown, state: Any, p99: Any, axis: int) -> tuple[BlockMap, charts.Extent]:
    """Blocks seen along ``axis``."""
    seen = project(state, p99, axis)
    sides = _others(axis)
    whole = [shown.shape[i] * shown.voxel_size[i] / 1000 for i in sides]
    cell = [
        shown.job.plan.block[i] * step * shown.voxel_size[i] / 1000 for i, step in zip(sides, seen.step, strict=True)
    ]
    return seen, charts.Extent((whole[0], whole[1]), (cell[0], cell[1]))


def _counted(found: dict[str, Any]) -> str:
    published = " (as published)" if found["threshold"] == found["published_threshold"] else ""
    said = (
        f"A block counts as reliable where the 99th percentile of its uncertainty is below {found['threshold']:g}"
        f"{published} on a grey scale from 0 to 1: {found['reliable_blocks']:,} of {found['blocks']:,} blocks, "
        f"{share(found['reliable_share'])}."
    )
    if (limit := found["largest_that_can_be_stored"]) and found["block_p99"]["largest"] >= 0.99 * limit:
        said += f" Uncertainties of {limit:.3f} are as large as can be stored, and may be larger."
    return said


def _calibrated(numbers: dict[str, Any]) -> str:
    calibrated, scores = numbers["reliability"]["calibrated"], numbers["scores"]
    if calibrated["measured_coverage"] is None:
        said = (
            "The threshold is a convention, and these weights were not calibrated for this factor and so many members."
        )
    else:
        said = (
            "The threshold is a convention; what was measured is that mean ± 1.645 × uncertainty, meant to hold the "
            f"truth in 90 % of voxels, held it in {calibrated['measured_coverage']:.1%} at calibration. At the "
            f"threshold that is ± {calibrated['half_width_at_threshold']:.2g} of the grey scale."
        )
    if scores and scores.get("uncertainty"):
        said += f" Against the truth given here it held {scores['uncertainty']['coverage']:.1%}."
    return said


def blocks(numbers: dict[str, Any]) -> list[page.Html]:
    parts = [page.element("h2", "Blocks")]
    names = list(numbers["stages"]["blocks"])
    rows = [(stage, *(f"{counts[name]:,}" for name in names)) for stage, counts in numbers["stages"].items()]
    parts.append(page.table(rows, ("", *names), numbers=range(1, len(names) + 1)))
    if numbers["failed_tries"]:
        parts.append(page.element("p", f"{numbers['failed_tries']:,} tries of blocks have failed."))
    for name, said in (
        ("failed", "set aside; emdvol reconstruct --retry-failed takes them again"),
        ("bridged", "made, but planes of them lie where sections are damaged"),
        ("skipped", "outside tissue; nothing was computed there"),
    ):
        found = numbers[name]
        if not found["count"]:
            continue
        parts.append(page.element("h3", f"{found['count']:,} {name}: {said}"))
        more = f" (the first {len(found['first'])})" if found["count"] > len(found["first"]) else ""
        head = ("block", "voxels z, y, x", "what was said")[: 3 if name == "failed" else 2]
        listed = page.table([(b["block"], b["box"], b.get("error"))[: len(head)] for b in found["first"]], head)
        if name == "failed":
            parts.append(page.joined([listed, more]))
        else:
            parts.append(page.element("details", page.joined([page.element("summary", f"Where{more}"), listed])))
    if damaged := numbers["damaged_sections"]:
        listed_sections = ", ".join(map(str, damaged[:50])) + (", ..." if len(damaged) > 50 else "")
        parts.append(page.element("p", f"Damaged sections of the input, not used: {listed_sections}."))
    return parts


def speed(shown: Shown, numbers: dict[str, Any], history: History) -> list[page.Html]:
    found = numbers["throughput"]
    parts, pictures = [page.element("h2", "Throughput")], []
    if over_time := found["over_time"]:
        edges, rates = np.array(over_time["seconds"]), np.array(over_time["voxels_per_second"])
        drawn = charts.throughput(edges, rates)
        pictures.append(page.picture(drawn, "throughput over time", title="Over time", more=over_time["source"]))
    seconds = shown.ledger.read("seconds")[shown.written()]
    if len(seconds):
        pictures.append(page.picture(charts.block_seconds(seconds), "seconds per block", title="Time for a block"))
    if not pictures:
        return [*parts, page.element("p", "Nothing is known yet.")]
    said = []
    if found["voxels_per_second"]:
        said.append(f"{found['voxels_accounted_for']:,} voxels in {duration(found['seconds_at_work'])} of work.")
    if history.voxels < numbers["finished_share"] * numbers["voxels"] * 0.99:
        said.append("Drivers that were killed, or still run, have not told the log what they did.")
    if counted := [f"{n:,} × {name}" for name, n in sorted(history.counts.items()) if name in NOTEWORTHY]:
        said.append(f"The log holds {', '.join(counted)}.")
    return [*parts, page.element("p", " ".join(said)), page.row(pictures, "1fr 1fr")]


def provenance(numbers: dict[str, Any]) -> list[page.Html]:
    made = numbers["provenance"]
    origin, decided, geometry = made["provenance"], made["fingerprint"], made["geometry"]
    weights, training, stored = origin["weights"], origin["weights"].get("training"), made["uncertainty"]
    software = ", ".join(f"{name} {version}" for name, version in origin["software"].items())
    volume, sampled = decided["input_identity"], decided["input_identity"].get("sample", "not known")
    rows: list[tuple[str, object]] = [
        ("Output", numbers["output"]),
        ("Input", origin["input"]),
        ("Input volume", f"{times(volume['shape'])} voxels of {times(volume['voxel_size'])} nm, {volume['format']}"),
        ("Input sample", f"digest {sampled}"),
        ("Mode", f"{decided['mode']}, factor {geometry['factor']} along z"),
        ("Weights", f"{weights['name']}, SHA-256 {weights['sha256']}"),
        ("Training data", _training(training)),
        ("Sampling", f"{decided['sampler']}, steps: {decided['steps']}"),
        ("Members", f"{decided['members']}, seed {decided['seed']}"),
        ("Greys", f"{made['greys']['low']:g} to {made['greys']['high']:g}, one map for the whole volume"),
        ("Uncertainty", f"{stored['meaning']}; step {stored['step']:g}, scale {stored['scale']:g}"),
        ("Computed on", f"{decided['device']}, {decided['precision']}; {software}"),
    ]  # fmt: skip
    return [
        page.element("h2", "How it was made"),
        page.table(rows),
        page.element("h3", "Methods paragraph"),
        page.element("p", numbers["methods"], cls="methods"),
        page.element("h3", "Full provenance"),
        page.element(
            "details",
            page.joined(
                [
                    page.element("summary", "What the output says of itself, enough to make it again"),
                    page.element("pre", json.dumps(plain(made), indent=1)),
                ]
            ),
        ),
        page.element("p", f"Report by emdiffuse_vol {numbers['report']['version']}, {numbers['report']['time']}; "
                          "the same numbers are in the JSON file beside it.", cls="under"),
    ]  # fmt: skip


def _training(training: Any) -> str:
    if isinstance(training, dict) and "data" in training:
        return f"{training['data']} ({training['licence']})" if training.get("licence") else str(training["data"])
    return "the weights do not say"


def scaled(value: float) -> str:
    """3.66 M, 12.1 k."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def times(numbers: Any) -> str:
    return " × ".join(f"{n:,}" if isinstance(n, int) else f"{n:.6g}" for n in numbers)


def share(value: float | None) -> str:
    """99.96 % is not 100 %."""
    if value is None:
        return "not known"
    return f"{value:.1%}" if value in (0, 1) or 0.0005 <= value <= 0.9995 else f"{value:.4%}"


def duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def plain(value: Any) -> Any:
    """JSON has neither tuples nor infinity."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value
