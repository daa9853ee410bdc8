"""Where and how precisely networks run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from emdiffuse_vol.errors import ConfigError, GeometryError


@dataclass(frozen=True)
class Device:
    """Where and how precisely networks run. ``precision``: float32 or bfloat16 (autocast)."""

    name: str
    precision: str

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.name.split(":")[0], torch.bfloat16)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a network. On a CPU one thread runs it: sums, and the last bits of some functions, depend on how many
        threads share them, and a run may be continued with other numbers of cores. Several networks at once
        (``--workers``) use the cores at least as well."""
        threads = torch.get_num_threads()
        if self.name == "cpu":
            torch.set_num_threads(1)
        try:
            with torch.inference_mode(), self.autocast():
                yield
        finally:
            torch.set_num_threads(threads)

    @property
    def step(self) -> int:
        """Planes that a network which can take a few at a time takes at once: on a CPU so few that what lies between
        its layers stays in the cache, on a GPU all that a tile has."""
        return 4 if self.name == "cpu" else 1 << 20

    def wait(self) -> None:
        """For what was asked of it: a GPU answers before it is done."""
        if self.name != "cpu":
            torch.cuda.synchronize(self.name)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device=self.name)

    def put(self, values: NDArray[Any]) -> Tensor:
        """An array as a tensor there."""
        return torch.as_tensor(values, device=self.name)


PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(name: str = "auto", precision: str = "auto", exact: bool = False) -> Device:
    """CUDA where there is one; bfloat16 where the hardware multiplies it, which most CPUs do not, unless the
    network's arithmetic is to be ``exact``: the published one tells noise levels apart by digits bfloat16 lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise GeometryError(
            f"device {name} was asked for, but torch {torch.__version__} finds no CUDA device; use --device cpu"
        )
    try:
        found = torch.device(name).type
    except RuntimeError:
        found = ""
    if found not in ("cpu", "cuda") or (
        found == "cuda" and (torch.device(name).index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(
            f"device {name!r} is not here; choose auto, cpu, cuda or cuda:N of {torch.cuda.device_count()}"
        )
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        fast = name != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        precision = "bfloat16" if fast and not exact else "float32"
    return Device(name, precision)
