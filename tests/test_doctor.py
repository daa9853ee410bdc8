"""`emdvol doctor`: says what is here and how to get what is not."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from emdiffuse_vol.cli import doctor
from emdiffuse_vol.cli.main import main


def told(*options: str) -> str:
    result = CliRunner().invoke(main, ["doctor", *options], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_json_says_what_is_here() -> None:
    found = json.loads(told("--json"))
    assert found["packages"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu" and len(found["devices"]) == 1 + torch.cuda.device_count()
    assert 1 <= found["cores"]["usable"] <= found["cores"]["machine"]
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert found["disk"]["writable"] and found["disk"]["free"] > 0
    assert set(found["extras"]) == {"view", "raft", "slurm", "train"}


def test_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "view", ("pictures", ("matplotlib", "no-such-package")))
    monkeypatch.setitem(doctor.TOOLS, "no-such-tool", "does wonders")
    text = told()
    assert "no-such-package missing: pip install 'emdiffuse_vol[view]' (pictures)" in text
    assert "not found (does wonders)" in text


def test_devices_that_compute_bfloat16_slowly_are_told_so() -> None:
    found = doctor.examine()
    found["devices"].append({"device": "cuda:0", "name": "Old", "memory": 8 << 30, "bfloat16": False})
    lines = dict(doctor.rows(found))
    assert "float32" in lines["cuda:0"] and "8.59 GB" in lines["cuda:0"]
    assert "cuda" not in lines


def test_extras_are_those_of_the_package() -> None:
    """What doctor looks for is what setup.cfg installs."""
    from configparser import ConfigParser
    from pathlib import Path

    parser = ConfigParser()
    parser.read(Path(__file__).parents[1] / "setup.cfg")
    asked = parser["options.extras_require"]
    for name, (_, packages) in doctor.EXTRAS.items():
        assert {line.split(">")[0].strip() for line in asked[name].split("\n") if line} == set(packages)
