"""What is handed out: sdist, wheel, and tutorials that do what they show. The site itself is built by `make docs`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from emdiffuse_vol import __version__

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


BUILD = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"


def test_sdist_and_wheel_hold_the_package_with_its_weights_and_the_wheel_runs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "emdiffuse_vol", tmp_path / "emdiffuse_vol", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, check=True, capture_output=True)
    package = tmp_path / "emdiffuse_vol"
    kinds = (".py", ".safetensors", ".md")
    files = {str(f.relative_to(tmp_path)) for f in package.rglob("*") if f.suffix in kinds and f.name != "README.md"}
    (wheel,) = (tmp_path / "dist").glob(f"emdiffuse_vol-{__version__}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert files <= set(archive.namelist())
        archive.extractall(tmp_path / "site")
    with tarfile.open(tmp_path / "dist" / f"emdiffuse_vol-{__version__}.tar.gz") as archive:
        assert files <= {name.partition("/")[2] for name in archive.getnames()}
    shown = subprocess.run(
        [sys.executable, "-m", "emdiffuse_vol", "--version"],
        cwd=tmp_path / "site",
        check=True,
        capture_output=True,
        text=True,
    )
    assert shown.stdout.strip() == f"emdvol, version {__version__}"


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first is not None and first[1] == __version__


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_run_and_show_pictures(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    shown, fresh = nbformat.read(path, 4), nbformat.read(path, 4)
    nbclient.NotebookClient(fresh, timeout=600, kernel_name="python3").execute()  # raises what a cell raises
    for notebook in (shown, fresh):
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert not any("Error" in output.get("text", "") for output in outputs)
