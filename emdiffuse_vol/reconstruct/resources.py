"""What a run needs of the machine, checked before anything is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from emdiffuse_vol.errors import OutputError


def check_resources(out: Path, disk_bytes: int, memory_bytes: int) -> None:
    """Refuse what cannot end well: a place that cannot be written, a disk or a memory too small."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write in {parent}; choose another --out or change its permissions")
    free = shutil.disk_usage(parent).free
    if free < disk_bytes:
        raise OutputError(
            f"the output may need {disk_bytes / 1e9:.1f} GB and {parent} has {free / 1e9:.1f} GB free; "
            f"free some space, choose another --out, or a smaller --roi"
        )
    available = available_memory()
    if available is not None and available < memory_bytes:
        raise OutputError(
            f"the run needs about {memory_bytes / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB is free; "
            f"use fewer --workers, or a smaller --tile or --shard"
        )


def available_memory() -> int | None:
    """Bytes of memory this machine can still give, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
