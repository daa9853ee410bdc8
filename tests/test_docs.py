"""What README and the model card say is what was measured, and what they name exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_committed_results() -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], check=True)


PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "emdiffuse_vol/models/weights").glob("*.md")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_tests_that_the_readme_names_exist() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text()):
        assert f"def {name}(" in tests, name


def test_every_top_level_folder_explains_itself() -> None:
    for folder in ("benchmarks", "configs", "docs", "emdiffuse_vol", "pipelines", "tests"):
        assert (ROOT / folder / "README.md").is_file(), folder
