"""Tables in README, the model card and docs, made from committed results, so that no number is typed by hand.

python benchmarks/tables.py           # rewrite what stands between the markers
python benchmarks/tables.py --check   # say which file is out of date (tests/test_docs.py does)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any

from emdiffuse_vol.cli.numbers import amount, digits, times

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BASELINES = ("linear", "cubic")
FILES = (
    ROOT / "README.md",
    *sorted((ROOT / "emdiffuse_vol" / "models" / "weights").glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
)


def isotropic() -> str:
    """PSNR and SSIM of every method at every factor."""
    report = json.loads((RESULTS / "models.json").read_text())
    names = list(report["factors"][0]["methods"])
    lines = [f"| factor | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for row in report["factors"]:
        methods = row["methods"]
        best = max(methods, key=lambda name: methods[name]["psnr"])
        cells = [f"{m['psnr']:.2f} / {m['ssim']:.3f}" for m in methods.values()]
        for i, name in enumerate(methods):
            if name not in BASELINES:
                cells[i] += f" ({methods[name]['psnr'] - methods['linear']['psnr']:+.2f} dB)"
            if name == best:
                cells[i] = f"**{cells[i]}**"
        lines.append(f"| x{row['factor']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", measured_on(report)])


def measured_on(report: dict[str, Any]) -> str:
    return f"Measured on {report['machine']}, with emdiffuse_vol {report['emdiffuse_vol']}."


# Heading, key of ``models.py``, format. A column is left out where no method has it.
COLUMNS = (
    ("PSNR, dB", "psnr", ".2f"),
    ("SSIM", "ssim", ".3f"),
    ("FSIM mean", "fsim", ".3f"),
    ("FSIM member", "fsim_member", ".3f"),
    ("LPIPS mean", "lpips", ".3f"),
    ("LPIPS member", "lpips_member", ".3f"),
    ("axial resolution, nm", "axial_resolution_nm", ".0f"),
    ("resolution, px", "resolution_px", ".2f"),
    ("axial power", "axial_power", ".2f"),
    ("CRPS", "crps", ".2f"),
    ("coverage", "coverage_90", ".1%"),
    ("spread / skill", "spread_skill_members", ".2f"),
    ("seam", "seam", ".3f"),
    ("parameters", "parameters", ",d"),
    ("FLOP per voxel", "flop_per_voxel", ".2g"),
    ("with overlap", "flop_per_voxel_with_overlap", ".2g"),
    ("s / Mvoxel", "seconds_per_megavoxel", ".3g"),
)


def scores(methods: dict[str, dict[str, Any]]) -> str:
    columns = [column for column in COLUMNS if any(column[1] in row for row in methods.values())]
    lines = [f"| | {' | '.join(heading for heading, _, _ in columns)} |", "|---|" + "---|" * len(columns)]
    for name, row in methods.items():
        cells = [format(row[key], form) if key in row else "" for _, key, form in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def models_at(factor: int) -> str:
    """Everything that was measured of every method at one factor."""
    report = json.loads((RESULTS / "models.json").read_text())
    (row,) = (row for row in report["factors"] if row["factor"] == factor)
    return f"{scores(row['methods'])}\n\nx{factor}, {row['missing_planes']} missing planes. {measured_on(report)}"


def models_best() -> str:
    """Scores of the ensembles beside their parts, one factor after the other."""
    report = json.loads((RESULTS / "models_best.json").read_text())
    names = list(report["factors"][0]["methods"])
    lines = [f"| factor | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for row in report["factors"]:
        linear = row["methods"]["linear"]["psnr"]
        cells = [
            f"{m['psnr']:.2f} / {m['ssim']:.3f}" + (f" ({m['psnr'] - linear:+.2f} dB)" if n not in BASELINES else "")
            for n, m in row["methods"].items()
        ]
        lines.append(f"| x{row['factor']} | {' | '.join(cells)} |")
    last = report["factors"][-1]["methods"]
    cost = ", ".join(f"{n} {m['flop_per_voxel']:.2g}" for n, m in last.items() if "flop_per_voxel" in m)
    held = ", ".join(f"{n} {m['coverage_90']:.1%}" for n, m in last.items() if "coverage_90" in m)
    at = report["factors"][-1]["factor"]
    return "\n".join([*lines, "", f"FLOP per voxel: {cost}. Coverage at x{at}: {held}.", "", measured_on(report)])


def models_published() -> str:
    report = json.loads((RESULTS / "models.json").read_text())
    subset = report["subset"]
    where = f"x{subset['factor']}, {subset['missing_planes']} missing planes of voxels {subset['box']}."
    return f"{scores(subset['methods'])}\n\n{where} {measured_on(report)}"


def restoration(part: str) -> str:
    """Sections restored, at every level of noise."""
    report = json.loads((RESULTS / "restoration.json").read_text())
    lines = []
    for level, row in report[part].items():
        counts = "no noise" if row["counts"] is None else f"{level}: {row['counts']:g} electrons a white pixel"
        lines += [f"**{counts[0].upper()}{counts[1:]}**", "", scores(row["methods"])]
        if "noise" in row:
            low, middle, high = row["noise_estimated"]
            lines += [
                "",
                f"Noise of {row['noise']:.1f} greys; estimated of single sections: {low:.1f} to {high:.1f}, median "
                f"{middle:.1f}. FastScan-ss has {row['share_of_supervised']:.0%} of the gain of FastScan-s.",
            ]
        lines.append("")
    return "\n".join([*lines, f"{report['shape'][0]} sections of {report['data']}. {measured_on(report)}"])


def restoration_pairs() -> str:
    report = json.loads((RESULTS / "restoration.json").read_text())
    pairs = report["real_pairs"]
    lines = []
    for name, rows in pairs["pairs"].items():
        lines += [f"**{name.replace('_', ' ')}**", "", scores(rows), ""]
    return "\n".join([*lines, f"Time for tuning: {pairs['minutes']:g} min. {measured_on(report)}"])


def segmentation() -> str:
    report = json.loads((RESULTS / "segmentation.json").read_text())
    lines = ["| segmented | split | merge | sum, bits | segments | gap closed |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {row['split']:.2f} | {row['merge']:.2f} | {row['sum']:.2f} | {row['segments']} | "
        f"{row['gap_closed']:.0%} |"
        for name, row in report["inputs"].items()
    ]
    return "\n".join(lines)


def adapting() -> str:
    """What weights gain over linear interpolation before and after they learnt from the volume."""
    report = json.loads((RESULTS / "adapting.json").read_text())
    lines = [
        "| volume | linear | default weights | adapted | interval holds: default, adapted |",
        "|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        before, after = case["before"], case["after"]
        lines.append(
            f"| {case['case']} | {case['linear_psnr']:.2f} dB | {before['gain_db']:+.2f} dB | "
            f"**{after['gain_db']:+.2f} dB** | {before['coverage_90']:.1%}, {after['coverage_90']:.1%} |"
        )
    steps = " and ".join(f"{case['steps']:,}" for case in report["cases"])
    return "\n".join([*lines, "", f"{report['minutes']:g} minutes each, {steps} steps. {measured_on(report)}"])


def training() -> str:
    """Speed and memory of a training step."""
    report = json.loads((RESULTS / "training.json").read_text())
    lines = ["| network | parameters | a step | voxels per second | peak memory |", "|---|---|---|---|---|"]
    lines += [
        f"| {case['case']} | {case['parameters']:,} | {case['seconds_per_step']:.2f} s | "
        f"{case['voxels_per_second']:,.0f} | {amount(case['peak_bytes'])} |"
        for case in report["cases"]
    ]
    return "\n".join([*lines, "", measured_on(report)])


def scale_arithmetic(name: str) -> str:
    """One plan, each number with how it comes about."""
    report = json.loads((RESULTS / "scale_plans.json").read_text())
    plan, assumed = report["plans"][name], report["assumed"]
    given, made, speed = plan["input"]["shape"], plan["output"]["shape"], plan["estimate"]["calibration"]
    voxels, tile, cell = prod(made), prod(plan["tile"]), plan["cell"]
    cells = [ceil(n / c) for n, c in zip(made, cell, strict=True)]
    blocks = [ceil(n / b) for n, b in zip(made, plan["block"], strict=True)]
    assert prod(cells) == plan["tiles"] and prod(blocks) == plan["blocks"]
    host = speed["host"] + report["noise_seconds_per_tile"]
    core_hours = plan["tiles"] * host / 3600
    gpu_hours = [plan["flop"] / (share * assumed["gpu_peak_flops"]) / 3600 for share in assumed["gpu_shares"]]
    shares = " and ".join(f"{share:.0%}" for share in assumed["gpu_shares"])
    published = assumed["published_flop_per_voxel"] * voxels
    rows = [
        ("voxels of the input", f"{prod(given):.3g}", f"{times(given)}, {amount(plan['input_bytes'])}"),
        ("planes of the output", f"{made[0]:,}", f"({given[0]:,} - 1) x {plan['factor']}, rounded down, + 1"),
        ("voxels of the output", f"{voxels:.3g}", times(made)),
        ("blocks", f"{plan['blocks']:,}", f"{times(blocks)}, of {times(plan['block'])} voxels or what is left"),
        ("tiles", f"{plan['tiles']:,}", f"{times(cells)} cells of {times(cell)} voxels"),
        (
            "FLOP of a tile",
            f"{plan['flop_per_voxel_network'] * tile:.3g}",
            f"{plan['flop_per_voxel_network']:,.0f} x {times(plan['tile'])}, the cell and its halo; "
            f"{plan['members']} members",
        ),
        ("FLOP in all", f"{plan['flop']:.3g}", f"tiles x FLOP of a tile: {plan['flop_per_voxel']:.3g} for each voxel"),
        (
            "FLOP of the published recipe",
            f"{published:.3g}",
            f"{assumed['published_flop_per_voxel']:.3g} x voxels: {published / plan['flop']:,.0f} times as many",
        ),
        (
            "**device-hours, measured**",
            f"**{digits(plan['estimate']['device_hours'])}**",
            f"tiles x {plan['estimate']['seconds_per_tile']:.1f} s on {speed['hardware']}, {plan['precision']}",
        ),
        (
            "core-hours around the network, measured",
            digits(core_hours),
            f"tiles x ({report['noise_seconds_per_tile']:.2f} s of noise + {speed['host']:.2f} s of greys, sums and "
            "codes) on one core; part of the row above",
        ),
        (
            "GPU-hours of the network, *derived*",
            " to ".join(map(digits, gpu_hours)),
            f"FLOP in all / ({shares} of {assumed['gpu_peak_flops'] / 1e12:.0f} TFLOP/s)",
        ),
        (
            "cores beside each GPU, *derived*",
            " to ".join(digits(core_hours / hours) for hours in reversed(gpu_hours)),
            "core-hours / GPU-hours: what it takes to keep the GPU busy",
        ),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(["| | | how |", "|---|---|---|", *lines])


def scale_limits() -> str:
    """What besides computing a run must be able to bear, for all plans."""
    report = json.loads((RESULTS / "scale_plans.json").read_text())
    plans, assumed = report["plans"], report["assumed"]
    rate = assumed["gpu_peak_flops"] * assumed["gpu_shares"][0]

    def fed(plan: dict[str, Any]) -> str:
        """GPUs that ask for as many blocks a second as one scheduler gives out."""
        seconds = plan["flop"] / plan["blocks"] / rate
        return " to ".join(digits(tasks * seconds) for tasks in assumed["scheduler_tasks_per_second"])

    def moved(plan: dict[str, Any]) -> float:
        total: float = plan["read_bytes"] + plan["pyramid_read_bytes"] + plan["written_bytes"]
        return total

    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "block": lambda p: times(p["block"]),
        "blocks": lambda p: f"{p['blocks']:,}",
        "ledger": lambda p: f"{amount(p['ledger_bytes'])}, {p['ledger_bytes'] / p['blocks']:.1f} B a block",
        "files": lambda p: f"{p['files']:,}",
        "largest file": lambda p: amount(2 * prod(p["shard"])),
        "written": lambda p: amount(p["written_bytes"]),
        "read again for the pyramid": lambda p: amount(p["pyramid_read_bytes"]),
        "read, as asked for": lambda p: f"{amount(p['read_bytes'])}, {p['read_amplification']:.2f} x the input",
        "read, whole chunks": lambda p: f"{p['read_amplification_chunks']:.2f} x the input",
        "memory of a process without a GPU": lambda p: amount(p["process_bytes"]),
        "bytes moved while a GPU works": lambda p: f"{amount(moved(p) / (p['flop'] / rate))}/s",
        "a block on a GPU": lambda p: f"{p['flop'] / p['blocks'] / rate:.2g} s",
        "GPUs one scheduler feeds": fed,
    }
    lines = [f"| {name} | {' | '.join(map(row, plans.values()))} |" for name, row in rows.items()]
    return "\n".join([f"| | {' | '.join(plans)} |", "|---|" + "---|" * len(plans), *lines])


def engine_faults() -> str:
    report = json.loads((RESULTS / "faults.json").read_text())
    lines = ["| what happens | trials | strikes | run again | identical |", "|---|---|---|---|---|"]
    lines += [
        f"| {kind} | {row['trials']} | {row['strikes']} | {row['reruns']} | {row['identical']} |"
        for kind, row in report["by_kind"].items()
    ]
    total = f"{report['trials']} trials: {report['lost']} lost, {report['corrupt']} corrupt, "
    return "\n".join([*lines, "", total + f"{report['manual_steps']} manual steps."])


def engine_scale() -> str:
    report = json.loads((RESULTS / "scale.json").read_text())
    rows = {
        "blocks": f"{report['blocks']:,}",
        "overhead": f"{report['milliseconds_per_block']:.3f} ms per block",
        "driver memory": f"{amount(report['driver_peak_bytes'])}, its range {amount(report['driver_growth_bytes'])}",
        "ledger": f"{amount(report['ledger_bytes'])} in {report['ledger_files']:,} files, "
        f"{amount(report['ledger_bytes_on_disk'])} on disk",
        "restart with half of the blocks done": f"{report['restart_seconds']:.1f} s",
        "`emdvol status`": f"{report['status_seconds']:.2f} s",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def engine_overhead() -> str:
    report = json.loads((RESULTS / "overhead.json").read_text())
    same, net = report["identity"], report["network"]
    return "\n".join(
        [
            "| | engine | without it | ratio |",
            "|---|---|---|---|",
            f"| copying blocks, against a tensorstore copy | {same['engine_mb_per_second']:.0f} MB/s | "
            f"{same['copy_mb_per_second']:.0f} MB/s | {same['ratio']:.2f} |",
            f"| default network, against a bare loop | {net['engine_voxels_per_second'] / 1e6:.3f} Mvoxel/s | "
            f"{net['bare_voxels_per_second'] / 1e6:.3f} Mvoxel/s | {net['ratio']:.2f} |",
        ]
    )


def engine_peers() -> str:
    report = json.loads((RESULTS / "peers.json").read_text())
    lines = [
        "| | Mvoxel/s | peak memory | bytes read / input | first block | redone after a kill | largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in report["methods"].items():
        lines.append(
            f"| {name} | {row['megavoxels_per_s']:.3f} | {amount(row['peak_memory_bytes'])} | "
            f"{row['bytes_read_over_volume']:.2f} | {row['first_block_seconds']:.1f} s | {row['redone']:.0%} | "
            f"{row['largest_difference']} |"
        )
    return "\n".join(lines)


def performance_steps() -> str:
    report = json.loads((RESULTS / "performance.json").read_text())
    peak = report["product_flop_per_second"]
    rows = {"padded, the tile at once": report["padded"]}
    rows |= {f"streamed, {step} plane{'s' * (step != '1')}": row for step, row in report["streamed"].items()}
    rows[f"streamed, {report['step']} planes, bfloat16"] = report["streamed_bfloat16"]
    lines = [
        "| | core-seconds | of them in the kernel | pages handed out | GFLOP | of the matrix product's speed |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        spent = row["user"] + row["system"]
        lines.append(
            f"| {name} | {spent:.2f} | {row['system'] / spent:.0%} | {row['page_faults']:,.0f} | "
            f"{row['flop'] / 1e9:.0f} | {row['flop'] / spent / peak:.0%} |"
        )
    noise, torched = (report[name]["user"] + report[name]["system"] for name in ("noise", "noise_in_torch"))
    fine, wide = report["flop_per_voxel"].values()
    return "\n".join(
        [
            *lines,
            "",
            f"Matrix product {peak / 1e9:.0f} GFLOP/s; noise of the members {noise:.3f} s, with torch's integers "
            f"{torched:.3f} s; FLOP per voxel {fine:,.0f} in tiles of 256 x 256 pixels, {wide:,.0f} in 512 x 512. "
            f"{report['hardware']}.",
        ]
    )


def performance_throughput() -> str:
    report = json.loads((RESULTS / "throughput.json").read_text())
    ratios, split = report["ratios"], report["split"]
    spent = sum(part["cpu"] for part in split.values())
    rows = {
        "whole command": f"{report['mvoxel_per_cpu_second']['command']:.3f} Mvoxel per core-second",
        "whole command over bare network": f"{ratios['command_over_network']:.2f}",
        "bare network": f"{report['mvoxel_per_cpu_second']['network']:.3f} Mvoxel per core-second, "
        f"{report['gflop_per_second']['network']:.0f} GFLOP/s",
        "bare network over matrix product": f"{ratios['network_over_matmul']:.2f}",
        "whole command over the published recipe": f"{ratios['command_over_published']:,.0f} x",
        "read, network, host, write": ", ".join(f"{part['cpu'] / spent:.1%}" for part in split.values()),
        "peak memory, predicted": f"{amount(report['command']['peak_bytes'])}, {amount(report['predicted_bytes'])}",
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    about = f"{report['hardware']}, {report['precision']}, input {report['input']}"
    return "\n".join([*lines, "", f"{about}, load before {report['load_before']:.1f}."])


def registration_residuals() -> str:
    report = json.loads((RESULTS / "registration.json").read_text())
    lines = ["| warp | dwell | noise, fixed / moving | flow | median | 95 % | time |", "|---|---|---|---|---|---|---|"]
    for row in report["residuals"]:
        noise = " / ".join(f"{n:.0f}" for n in row["noise"])
        lines.append(
            f"| {row['warp']} | {row['dwell']} | {noise} | {row['flow']} | {row['median']:.2f} | {row['p95']:.2f} | "
            f"{row['seconds']:.1f} s |"
        )
    return "\n".join([*lines, "", measured_on(report)])


def registration_confidence() -> str:
    report = json.loads((RESULTS / "registration.json").read_text())
    lines = ["| confidence | pixels | median | 95 % |", "|---|---|---|---|"]
    lines += [
        f"| {row['from']:g} to {row['to']:g} | {row['share']:.1%} | {row['median']:.2f} px | {row['p95']:.2f} px |"
        for row in report["confidence"]
    ]
    return "\n".join(lines)


def registration_others() -> str:
    report = json.loads((RESULTS / "registration.json").read_text())
    lines = ["| what | measured |", "|---|---|"]
    for by, row in report["refused"].items():
        greatest = ", ".join(f"{name} {value:.3g}" for name, value in row["greatest"].items())
        lines.append(
            f"| unrelated sections, by {by} | {row['refused']} of {row['pairs']} refused; at most {greatest} |"
        )
    jitter = report["drift"]["jitter_px"]
    after = ", ".join(f"{value:.2f} px with {name}" for name, value in jitter.items() if name != "before")
    lines.append(f"| jitter of {report['drift']['sections']} sections | {jitter['before']:.2f} px before, {after} |")
    for name, row in report["pairs"].items():
        lines.append(
            f"| real pair {name} | bent by {row['bend_px']['median']:.2f} px (median), correlation "
            f"{row['correlation_without_flow']:.4f} before flow and {row['measures']['correlation']:.4f} after, cycle "
            f"{row['cycle_px']['median']:.2f} px (95 %: {row['cycle_px']['p95']:.2f}) |"
        )
    return "\n".join(lines)


def conversion() -> str:
    report = json.loads((RESULTS / "convert.json").read_text())
    lines = ["| to | MB/s | of a plain copy | peak memory, and for 4x the size |", "|---|---|---|---|"]
    lines.append(f"| plain copy of OME-Zarr by tensorstore | {report['plain_copy_mb_per_second']:.1f} | 1 | |")
    for kind, row in report["formats"].items():
        peaks = [amount(n) for n in report["peak_bytes"].get(kind, {}).values()]
        lines.append(f"| {kind} | {row['mb_per_second']:.1f} | {row['of_plain_copy']:.2f} | {', '.join(peaks)} |")
    sizes = report["megabytes"]
    memory = f"{sizes['1x']} and {sizes['4x']} MB for the memory"
    about = f"{report['machine']}, busy with other work; uint8, {sizes['speed']} MB for the speed, {memory}."
    return "\n".join([*lines, "", about])


def chain() -> str:
    report = json.loads((RESULTS / "chain.json").read_text())
    lines = [
        "| noise | | PSNR of sections, dB | coverage | PSNR between, dB | coverage |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        held = [f"{row[key]:.1%}" if key in row else "" for key in ("coverage_sections", "coverage_between")]
        cells = [
            row["noise"],
            row["method"],
            f"{row['psnr_sections']:.2f}",
            held[0],
            f"{row['psnr_between']:.2f}",
            held[1],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Every {report['factor']}th section of fib25_val. {measured_on(report)}"])


def reliability() -> str:
    report = json.loads((RESULTS / "reliability.json").read_text())
    units = {"noise": "noise x{:g}", "spacing": "sections {:g} nm apart"}
    lines = [
        "| | PSNR, dB | poor blocks | flagged: 99th percentile | flagged: expected error |",
        "|---|---|---|---|---|",
    ]
    for row in report["conditions"]:
        shares = " | ".join(f"{row[key]:.0%}" for key in ("poor", "flagged_published", "flagged_ours"))
        lines.append(f"| {units[row['kind']].format(row['level'])} | {row['psnr']:.1f} | {shares} |")
    ranks = [f"{report[f'rank_correlation_of_{field}_and_error']:.2f}" for field in ("p99", "mean")]
    about = f"Rank correlation with the error of a block: {ranks[0]} for the 99th percentile, {ranks[1]} for the mean."
    return "\n".join([*lines, "", f"{about} {report['weights']}, {report['machine']}."])


TABLES: dict[str, Callable[[], str]] = {
    "isotropic": isotropic,
    **{f"models:x{factor}": partial(models_at, factor) for factor in (4, 5, 6, 8, 10)},
    "models:best": models_best,
    "models:published": models_published,
    "restoration:denoising": partial(restoration, "denoising"),
    "restoration:resolution": partial(restoration, "resolution"),
    "restoration:pairs": restoration_pairs,
    "chain": chain,
    "reliability": reliability,
    "segmentation": segmentation,
    "conversion": conversion,
    "adapting": adapting,
    "training": training,
    "registration:residuals": registration_residuals,
    "registration:confidence": registration_confidence,
    "registration:others": registration_others,
    "engine:faults": engine_faults,
    "engine:scale": engine_scale,
    "engine:overhead": engine_overhead,
    "engine:peers": engine_peers,
    "performance:steps": performance_steps,
    "performance:throughput": performance_throughput,
    "scale:MICrONS": partial(scale_arithmetic, "MICrONS"),
    "scale:FANC": partial(scale_arithmetic, "FANC"),
    "scale:limits": scale_limits,
}


def filled(text: str) -> str:
    for name, make in TABLES.items():
        start, end = f"<!-- table:{name} -->\n", "<!-- end -->"
        if start in text:
            before, rest = text.split(start, 1)
            text = f"{before}{start}{make()}\n{end}{rest.split(end, 1)[1]}"
    return text


def stale() -> list[Path]:
    return [path for path in FILES if filled(path.read_text()) != path.read_text()]


if __name__ == "__main__":
    out_of_date = stale()
    if "--check" in sys.argv:
        sys.exit("\n".join(f"{path.name} is out of date; run benchmarks/tables.py" for path in out_of_date) or None)
    for path in out_of_date:
        path.write_text(filled(path.read_text()))
