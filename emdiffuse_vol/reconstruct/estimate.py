"""What a run would cost, told before it starts: tiles, bytes, files, hours and money.

Convention: counts are of the whole run and exact, however many blocks there are. Blocks and tiles lie on grids and all
that a block needs is a box, so a sum over blocks is a product of three sums, one along each axis. Bytes are
uncompressed. Hours are those of one device that computes all the time: tiles times the seconds of one, measured on a
few. Reading and writing happen meanwhile and are not among them; their bytes are told instead. Nothing is known yet
of what is empty or masked: a run does at most what is said here.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emdiffuse_vol.geometry.boxes import Box, Triple, cell_box, grid_shape
from emdiffuse_vol.reconstruct.device import Device
from emdiffuse_vol.reconstruct.ledger import FIELDS, LEVEL_FIELDS
from emdiffuse_vol.reconstruct.plan import Plan
from emdiffuse_vol.reconstruct.predict import Predictor, Tile, predict_block
from emdiffuse_vol.reconstruct.worker import context_for
from emdiffuse_vol.stores.phantom import PhantomVolume
from emdiffuse_vol.stores.pyramid import pyramid_shapes
from emdiffuse_vol.stores.volume import Nanometres, VolumeSpec, mirror_source, read_mirrored

if TYPE_CHECKING:
    from emdiffuse_vol.reconstruct.run import Prepared

SECONDS, RUNS = 5.0, 3  # what a calibration is content with
CHUNK: Triple = (64, 64, 64)  # of a volume that is not there: what ``emdvol convert`` writes


@dataclass(frozen=True)
class Totals:
    """Sums over all blocks. tiles: those that contribute; predicted: those of them that the network computes, the rest
    being sections that are copied; asked: input voxels; fetched: the same in whole chunks, None where the input has
    none; needed: input voxels that some block asks for, each counted once."""

    tiles: int
    predicted: int
    asked: int
    fetched: int | None
    needed: int


def totals(plan: Plan, chunk: Triple | None) -> Totals:
    tiles, predicted, asked, fetched, needed = map(prod, zip(*(_along(plan, a, chunk) for a in range(3)), strict=True))
    return Totals(tiles, predicted, asked, fetched if chunk else None, needed)


def _along(plan: Plan, axis: int, chunk: Triple | None) -> tuple[int, int, int, int, int]:
    """``Totals`` of the blocks in one row along an axis, in tiles and voxels of that axis."""
    tiles = predicted = asked = fetched = needed = reached = 0
    size, stride = plan.mode.input_shape[axis], prod(plan.grid[axis + 1 :])
    for number in range(0, plan.grid[axis] * stride, stride):
        row = list(plan.tiling.tiles_for(_needle(plan.write_box(number), axis)))
        places = {tile[axis] for tile in row}
        tiles += len(places)
        predicted += sum(axis > 0 or not _copied(plan, place) for place in places)
        box = plan.tiling.input_box(row[0]) | plan.tiling.input_box(row[-1])
        source = mirror_source(plan.mode.read_box(box), plan.mode.stack_shape)
        start, stop = source.start[axis], source.stop[axis]
        asked += stop - start
        if chunk:
            # Along z the source counts good sections only, and chunks hold the others too.
            wanted = plan.mode.axial.good[start:stop] if axis == 0 else np.arange(start, stop)
            first = np.unique(wanted // chunk[axis]) * chunk[axis]
            fetched += int((np.minimum(first + chunk[axis], size) - first).sum())
        needed += max(0, stop - max(start, reached))
        reached = max(stop, reached)
    return tiles, predicted, asked, fetched, needed


def _needle(box: Box, axis: int) -> Box:
    """As long as the box along one axis, one voxel thick."""
    z, y, x = (b if i == axis else a + 1 for i, (a, b) in enumerate(zip(box.start, box.stop, strict=True)))
    return Box(box.start, (z, y, x))


def _copied(plan: Plan, layer: int) -> bool:
    """Whether all planes of a layer of tiles are copies of sections."""
    depth = plan.tiling.core[0]
    return bool(plan.mode.axial.copied(np.arange(layer * depth, (layer + 1) * depth)).all())


def traffic(plan: Plan, spec: VolumeSpec) -> dict[str, Any]:
    """What is computed, read and written, as JSON values. spec: of the input."""
    sums, size = totals(plan, spec.chunk), np.dtype(spec.dtype).itemsize
    shapes = pyramid_shapes(plan.region.shape)
    voxels = [prod(shape) for shape in shapes]
    files = [prod(grid_shape(shape, plan.shard)) for shape in shapes]
    return {
        "tiles": sums.predicted,
        "overlap_work": sums.tiles * prod(plan.tiling.shape) / voxels[0] - 1,
        "input_bytes": sums.needed * size,
        "read_bytes": sums.asked * size,
        "read_amplification": sums.asked / sums.needed,
        "read_amplification_chunks": sums.fetched and sums.fetched / sums.needed,
        "pyramid_read_bytes": 2 * size * sum(voxels[:-1]),
        "written_bytes": 2 * size * sum(voxels),
        "files": sum(files),
        "ledger_bytes": _ledger_bytes(FIELDS) * len(plan) + _ledger_bytes(LEVEL_FIELDS) * sum(files[1:]),
    }


def _ledger_bytes(fields: dict[str, str]) -> int:
    """Of one block; its state is a byte more."""
    return 1 + sum(np.dtype(dtype).itemsize for dtype in fields.values())


@dataclass(frozen=True)
class Speed:
    """Seconds of a tile in the network, and around it (greys, blending, spread, codes). hardware: what they were
    measured on; runs: of the network; evaluations: how many of those of a tile were timed, the rest in proportion."""

    network: float
    host: float
    hardware: str
    runs: int
    evaluations: int


def calibrate(prepared: Prepared, seconds: float = SECONDS, runs: int = RUNS) -> Speed:
    """Time the tile in the middle of the run as a worker computes it, on the device that was chosen."""
    predictor, job, one = prepared.predictor, prepared.job, _middle(prepared.plan)
    block = one[0]
    sections = read_mirrored(prepared.volume, block.read)
    idle = Idle(predictor, job.device)
    host, _ = _clock(lambda: predict_block(one, block, idle, sections, job.grey_map, job.scale), seconds, runs)
    # Of a network that runs hundreds of times for a tile one evaluation is timed: they are all alike.
    short = context_for(job if predictor.evaluations == 1 else replace(job, members=1, steps=1)).predictor
    tiles, device = idle.tiles[: predictor.batch], Device(job.device, job.precision)

    def evaluate() -> None:
        short(tiles)
        device.wait()

    network, timed = _clock(evaluate, seconds, runs) if tiles else (0.0, 0)
    share = predictor.evaluations / short.evaluations / max(1, len(tiles))
    return Speed(network * share, host / max(1, len(idle.tiles)), hardware(job.device), timed, short.evaluations)


class Idle:
    """A predictor without a network: what ``predict_block`` costs with it is the work around the network."""

    def __init__(self, predictor: Predictor, device: str = "cpu") -> None:
        self.tiling, self.batch, self.members = predictor.tiling, predictor.batch, predictor.members
        self.lost, self.evaluations = predictor.lost, predictor.evaluations
        self.seen: dict[Box, Tile] = {}
        # Not constant: that is taken for a failure.
        reach = self.tiling.reach_box((0, 0, 0)).shape
        self._output = torch.ones((self.batch, 1 + self.members, *reach), device=device)
        self._output[..., ::2] = -1

    def __call__(self, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
        self.seen |= {tile.box: tile for tile in tiles}
        output = self._output[: len(tiles)]
        return output[:, 0], output[:, 1:]

    @property
    def tiles(self) -> list[Tile]:
        """All it was ever given."""
        return list(self.seen.values())

    def flops(self) -> int:
        return 0

    def memory(self) -> int:
        return self._output.nbytes


def _middle(plan: Plan) -> Plan:
    """A plan of one block: the cell of a tile in the middle, and no layer that is copied, if there is another."""
    place = [a + (b - a) // 2 for a, b in zip(plan.region.start, plan.region.stop, strict=True)]
    k, j, i = (p // c for p, c in zip(place, plan.tiling.core, strict=True))
    cells = [cell_box((layer, j, i), plan.tiling.core) & plan.region for layer in (k, k + 1, k - 1)]
    computed = (cell for cell, layer in zip(cells, (k, k + 1, k - 1), strict=True) if not _copied(plan, layer))
    cell = next((cell for cell in computed if not cell.empty), cells[0])
    return replace(plan, region=cell, block=plan.tiling.core)


def _clock(work: Callable[[], Any], seconds: float, runs: int) -> tuple[float, int]:
    """Mean seconds of a call, and how many were timed: ``runs``, or fewer once ``seconds`` have passed.

    The first warms up and is not timed, unless it takes so long by itself that warming up is no part of it.
    """
    taken: list[float] = []
    warm = False
    while len(taken) < runs and sum(taken) < seconds:
        started = time.perf_counter()
        work()
        elapsed = time.perf_counter() - started
        if warm or elapsed > seconds:
            taken.append(elapsed)
        warm = True
    return sum(taken) / len(taken), len(taken)


def hardware(device: str) -> str:
    """The name of a device, and for a processor how many of its cores a network uses."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    threads = torch.get_num_threads()
    return f"{next(names, platform.machine())}, {threads} thread{'s' if threads > 1 else ''}"


def estimate(prepared: Prepared, speed: Speed, devices: int = 1, price: float | None = None) -> dict[str, Any]:
    """Time and cost, as JSON values. price: of a device for an hour, in any currency."""
    plan, spec = prepared.plan, prepared.volume.spec
    work = traffic(plan, spec)
    # A block of copied sections has no tile, but is made.
    seconds = work["tiles"] * speed.network + max(work["tiles"], len(plan)) * speed.host
    moved = sum(work[kind] for kind in ("read_bytes", "pyramid_read_bytes", "written_bytes"))
    return {
        "calibration": asdict(speed),
        "seconds_per_tile": speed.network + speed.host,
        "seconds_per_block": seconds / len(plan),  # the mean, of whole blocks and of those at the faces
        "voxels_per_second": plan.region.size / seconds,
        "bytes_per_second": moved / seconds,
        "device_hours": seconds / 3600,
        "devices": devices,
        "days": seconds / 86400 / devices,
        "price_per_device_hour": price,
        "cost": None if price is None else seconds / 3600 * price,
    }


@dataclass(frozen=True)
class ImaginedVolume:
    """A volume that is not there, of any size. Its greys are a pattern: nothing that is told here depends on them."""

    spec: VolumeSpec
    url: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @staticmethod
    def of(shape: Triple, voxel_size: Nanometres) -> ImaginedVolume:
        """Raises InputError for a shape or a voxel size that is not positive."""
        phantom = PhantomVolume.of(shape, voxel_size)
        return ImaginedVolume(replace(phantom.spec, chunk=CHUNK), phantom.url)

    def read(self, box: Box) -> NDArray[Any]:
        z, y, x = np.ogrid[box.slices()]
        greys: NDArray[Any] = ((31 * z + 7 * y + 3 * x) % 251).astype(np.uint8)
        return greys
