"""Tables in README and the model card, made from committed results, so that no number is typed by hand.

python benchmarks/tables.py           # rewrite what stands between the markers
python benchmarks/tables.py --check   # say which file is out of date (tests/test_docs.py does)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = (ROOT / "README.md", ROOT / "emdiffuse_vol" / "models" / "weights" / "vemdiffuse-slab.md")


def isotropic() -> str:
    report = json.loads((RESULTS / "isotropic.json").read_text())
    lines = [
        "| factor | linear: PSNR / SSIM | cubic | **ours** | gain | coverage | FLOP per voxel |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["factors"]:
        scores = [f"{row[name]['psnr']:.2f} / {row[name]['ssim']:.3f}" for name in ("linear", "cubic", "ours")]
        lines.append(
            f"| x{row['factor']} | {scores[0]} | {scores[1]} | **{scores[2]}** | +{row['gain_db']:.2f} dB | "
            f"{row['coverage_90']:.1%} | {row['flop_per_voxel_with_overlap']:.2g} |"
        )
    return "\n".join([*lines, "", f"Measured on {report['machine']}, with emdiffuse_vol {report['emdiffuse_vol']}."])


TABLES: dict[str, Callable[[], str]] = {"isotropic": isotropic}


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
