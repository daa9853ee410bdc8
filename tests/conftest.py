"""Shared by all tests: where real data are, and small volumes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real EM volumes; tests that need it are skipped where it is not given."""
    folder = os.environ.get("EMDVOL_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("EMDVOL_DATA does not name a folder of real EM volumes")
    return Path(folder)


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    """Test processes run side by side."""
    torch.set_num_threads(1)
