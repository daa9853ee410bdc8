"""`emdvol doctor`: what is here to work with, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

PACKAGES = ("torch", "numpy", "tensorstore", "zarr", "dask", "distributed", "numcodecs", "tifffile", "click")
# What an extra is for, and packages that come with it.
EXTRAS = {
    "view": ("emdvol view and report", ("matplotlib", "neuroglancer")),
    "raft": ("emdvol register --flow raft", ("torchvision",)),
    "slurm": ("runs on SLURM through dask", ("dask-jobqueue",)),
    "train": ("curves of a training in TensorBoard", ("tensorboard",)),
}
TOOLS = {
    "sbatch": "submits jobs to SLURM",
    "squeue": "lists jobs of SLURM",
    "nvidia-smi": "shows NVIDIA GPUs",
    "chromium": "draws emdvol view --screenshot",
}
SCARCE_DISK, SCARCE_MEMORY = 10e9, 4e9


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Say what is installed, which devices, memory and disk there are, and how to get what is missing."""
    import json

    found = examine()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for row in rows(found):
        table.add_row(*row)
    Console().print(table)


def examine() -> dict[str, Any]:
    import os
    import platform
    import shutil

    import psutil

    from emdiffuse_vol import __version__

    here = Path.cwd()
    disk = shutil.disk_usage(here)
    memory = psutil.virtual_memory()
    return {
        "emdiffuse_vol": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: installed(name) for name in PACKAGES},
        "devices": devices(),
        "cores": {"usable": usable_cores(), "machine": os.cpu_count()},
        "memory": {"total": memory.total, "available": memory.available},
        "disk": {"folder": str(here), "free": disk.free, "total": disk.total, "writable": os.access(here, os.W_OK)},
        "tools": {name: find(name) for name in TOOLS},
        "extras": {name: extra(name) for name in EXTRAS},
    }


def installed(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def extra(name: str) -> dict[str, Any]:
    use, packages = EXTRAS[name]
    missing = [package for package in packages if installed(package) is None]
    return {"for": use, "missing": missing, "get": f"pip install 'emdiffuse_vol[{name}]'" if missing else None}


def find(tool: str) -> str | None:
    import shutil

    if tool == "chromium":
        from emdiffuse_vol.viewing.viewer import find_chromium

        return find_chromium()
    return shutil.which(tool)


def usable_cores() -> int:
    """Those that this process may use: a job's share of its machine, where that is set."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices() -> list[dict[str, Any]]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a library that its wheel wants is not here
        return [{"device": "none", "name": f"torch cannot be loaded: {error}"}]
    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    ]
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        bf16 = about.major >= 8  # older ones compute bfloat16 in software
        found.append({"device": f"cuda:{i}", "name": about.name, "memory": about.total_memory, "bfloat16": bf16})
    return found


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    from emdiffuse_vol.cli.numbers import amount

    packages = ", ".join(f"{name} {version or 'MISSING'}" for name, version in found["packages"].items())
    lines = [
        ("emdvol", f"{found['emdiffuse_vol']}, Python {found['python']}, {found['system']}"),
        ("packages", packages),
    ]
    for device in found["devices"]:
        about = [device["name"]]
        if "memory" in device:
            about += [amount(device["memory"]), "bfloat16" if device["bfloat16"] else "no fast bfloat16: use float32"]
        if "threads" in device:
            about.append(f"{device['threads']} threads")
        lines.append((device["device"], ", ".join(about)))
    if not any("memory" in device for device in found["devices"]):
        lines.append(("cuda", "no CUDA device: networks run on the CPU"))
    cores, memory, disk = found["cores"], found["memory"], found["disk"]
    lines.append(("cores", f"{cores['usable']} of {cores['machine']}"))
    scarce = "; little: use a small --block" if memory["available"] < SCARCE_MEMORY else ""
    lines.append(("memory", f"{amount(memory['available'])} free of {amount(memory['total'])}{scarce}"))
    scarce = "; little" if disk["free"] < SCARCE_DISK else ""
    scarce += "; NOT WRITABLE" if not disk["writable"] else ""
    lines.append(("disk", f"{amount(disk['free'])} free of {amount(disk['total'])} at {disk['folder']}{scarce}"))
    lines += [(name, path or f"not found ({TOOLS[name]})") for name, path in found["tools"].items()]
    for name, about in found["extras"].items():
        said = "installed" if not about["missing"] else f"{', '.join(about['missing'])} missing: {about['get']}"
        lines.append((f"[{name}]".replace("[", "\\["), f"{said} ({about['for']})".replace("[", "\\[")))
    return lines
