"""Numbers as people read them, in tables of the command line and of the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def times(numbers: Iterable[int]) -> str:
    return " x ".join(f"{n:,}" for n in numbers)


def digits(number: float) -> str:
    """Three that matter: 0.0123, 4.56, 78,900."""
    return f"{float(f'{number:.3g}'):,.0f}" if number >= 100 else f"{number:.3g}"


def amount(count: float) -> str:
    """Bytes in units of a thousand: 1.2 MB, 345 TB."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


def reading(ended: dict[str, Any]) -> str:
    """What a run has read of its input, from its last event; empty where that is not known."""
    if "read_bytes" not in ended:
        return ""
    return (
        f" It read {amount(ended['read_bytes'])} as stored, {ended['read_amplification']:.2f} times "
        f"the {amount(ended['needed_bytes'])} of input voxels that it needed."
    )
