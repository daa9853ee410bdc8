"""From sections to mean and members: networks applied to tiles, tiles put together to blocks.

Convention: greys are normalised (see ``greys``); a predictor takes tiles of one fixed shape and returns, for each,
the mean [z, y, x] and K members [k, z, y, x] of the tile's input box. A tile's result depends on the tile alone, not
on the block, the batch or the process that computes it. Members are put together first and compared afterwards, so
the spread has no dip where tiles overlap.

Where sections are damaged, planes between good neighbours farther apart are predicted from these, with a spread scaled
for the distance. Beyond the first or last good section nothing was measured: what is stored there is a mirror image,
and its uncertainty says that nothing is known.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from emdiffuse_vol.errors import BlockError
from emdiffuse_vol.geometry.boxes import Box, Triple, cell_box, cells_meeting
from emdiffuse_vol.geometry.tiles import Tiling
from emdiffuse_vol.reconstruct.greys import Codes, FloatArray, GreyMap
from emdiffuse_vol.reconstruct.plan import Block, Plan

# Normalised greys by which tissue differs from other tissue, root mean square: 0.73 in FIB-25, 0.69 in the VNC stack,
# between places 8 sections apart.
UNKNOWN = 0.7

# How PyTorch and the libraries below it say on the CPU, or outside its allocator, what OutOfMemoryError says elsewhere.
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "could not create a memory")


@dataclass(frozen=True)
class Tile:
    """box: output voxels computed; sections: [s, y, x]; index, t: [z], see ``models.slab.slab_features``."""

    box: Box
    sections: FloatArray
    index: NDArray[np.int64]
    t: FloatArray


class Predictor(Protocol):
    """``lost`` is the number of degrees of freedom the members' spread about the mean has lost: 0 where the mean is an
    output of its own, 1 where it is the members' average. ``evaluations``: network runs per voxel. ``batch``: tiles it
    takes at once; made smaller, for good, where they do not fit the memory."""

    tiling: Tiling
    batch: int
    members: int
    lost: int
    evaluations: int

    def __call__(self, tiles: list[Tile]) -> tuple[FloatArray, FloatArray]:
        """At most ``batch`` tiles -> mean [n, z, y, x], members [n, k, z, y, x]."""
        ...

    def flops(self) -> int:
        """Floating-point operations (multiply and add count as two) for one tile, mean and all members."""
        ...

    def memory(self) -> int:
        """Bytes held at the peak of one call, besides what it is given; measured by ``benchmarks/memory.py``."""
        ...


def predict_block(
    plan: Plan,
    block: Block,
    predictor: Predictor,
    sections: NDArray[Any],
    greys: GreyMap,
    scale: float | Mapping[int, float],
    fills: Mapping[Triple, float] | None = None,
) -> NDArray[Any]:
    """-> [2, z, y, x], mean and uncertainty as stored, of ``block.write``.

    sections: stored greys of ``block.read``. scale: calibration, stored uncertainty over the members' spread, one for
    all or one for each span of sections. fills: stored grey of each cell of the tiling that is empty (see
    ``reconstruct.empty``); its uncertainty is 0, and nothing is computed for it.

    Raises BlockError where the output of the network is not data, or where one tile does not fit the memory.
    """
    fills = fills or {}
    codes = Codes(str(sections.dtype))
    result = np.empty((2, *block.write.shape), sections.dtype)
    window = plan.tiling.window()

    def make(tile: Triple) -> Tile:
        return _tile(plan, tile, sections, block.read, greys)

    for piece, tiles in plan.pieces(block.write):
        part = result[(slice(None), *piece.slices(block.write.start))]
        if not _all_empty(plan, piece, fills):
            sums = np.zeros((1 + predictor.members, *piece.shape), np.float32)
            wanted = [tile for tile in tiles if _wanted(plan, tile, piece, fills)]
            try:
                for tile, mean, members in _run(predictor, wanted, make):
                    _add_tile(plan, tile, mean, members, window, piece, sums)
                if not np.isfinite(sums).all():
                    raise BlockError("the network gave NaN or infinity; not written")
            except BlockError as error:
                raise BlockError(f"block {block.index} ({block.write}): {error}") from None
            part[0] = codes.mean(greys.restore(sums[0]))
            part[1] = codes.uncertainty(greys.restore_spread(_uncertainty(plan, piece, sums, predictor, scale)))
            _copy_sections(plan, piece, sections, block.read, part)
        _fill_empty(plan, piece, fills, part)
    return result


def _run(
    predictor: Predictor, tiles: list[Triple], make: Callable[[Triple], Tile]
) -> Iterator[tuple[Triple, FloatArray, FloatArray]]:
    """The network over tiles, in batches. A batch that does not fit the memory is halved, and stays so."""
    done, again = 0, False
    while done < len(tiles):
        size = predictor.batch
        batch = [make(tile) for tile in tiles[done : done + size]]
        if (output := _attempt(predictor, batch)) is None:
            if size == 1 and again:
                z, y, x = predictor.tiling.shape
                raise BlockError(
                    f"memory is too small for one tile of {z} x {y} x {x}; use a smaller --tile, or fewer --workers"
                )
            again = size == 1
            predictor.batch = min(predictor.batch, max(1, size // 2))  # another thread may have been here
            free_memory()
            continue
        for tile, given, mean, members in zip(tiles[done : done + size], batch, *output, strict=True):
            _check_output(given, mean)
            yield tile, mean, members
        done, again = done + len(batch), False


def _attempt(predictor: Predictor, batch: list[Tile]) -> tuple[FloatArray, FloatArray] | None:
    """None where memory ran out. By then the error is gone, and with it what its frames held."""
    try:
        return predictor(batch)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or any(w in str(error) for w in NO_MEMORY)):
            raise
    return None


def free_memory() -> None:
    """Give back what is held for later use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_output(tile: Tile, mean: FloatArray) -> None:
    """A constant output from the network is a failure, not data, unless the sections next to its planes are as empty:
    a few specks may be lost on the way."""
    if mean.min() == mean.max():
        near = tile.sections[np.union1d(tile.index, tile.index + 1).clip(max=len(tile.sections) - 1)]
        if np.mean(near != np.median(near)) > 0.01:
            raise BlockError(f"the network gave one grey for all of tile {tile.box}, whose input is not; not written")


def _add_tile(
    plan: Plan,
    tile: Triple,
    mean: FloatArray,
    members: FloatArray,
    window: FloatArray,
    piece: Box,
    sums: FloatArray,
) -> None:
    """Add the weighted mean and members of a tile to ``sums`` of a piece of a block."""
    start = plan.tiling.input_box(tile).start
    part = plan.tiling.reach_box(tile) & piece
    if part.empty:
        return
    inside, target = part.slices(start), part.slices(piece.start)
    weights = window[inside]
    sums[(0, *target)] += weights * mean[inside]
    sums[(slice(1, None), *target)] += weights * members[(slice(None), *inside)]


def _uncertainty(
    plan: Plan, piece: Box, sums: FloatArray, predictor: Predictor, scale: float | Mapping[int, float]
) -> FloatArray:
    """Calibrated spread of the members about the mean, normalised greys [z, y, x]."""
    mean, members = sums[0], sums[1:]
    variance = np.square(members - mean).sum(axis=0) / np.float32(predictor.members - predictor.lost)
    spread: FloatArray = np.sqrt(variance)
    planes = np.arange(piece.start[0], piece.stop[0])
    scales = [scale[int(n)] if isinstance(scale, Mapping) else scale for n in plan.mode.axial.span(planes)]
    spread *= np.array(scales, np.float32)[:, None, None]
    beyond = plan.mode.axial.beyond(planes)
    spread[beyond] = np.maximum(spread[beyond], np.float32(UNKNOWN))
    return spread


def _tile(plan: Plan, index: Triple, sections: NDArray[Any], read: Box, greys: GreyMap) -> Tile:
    box = plan.tiling.input_box(index)
    needed = plan.mode.read_box(box)
    below, t = plan.mode.axial.locate(np.arange(box.start[0], box.stop[0]))
    greys_of_tile = np.ascontiguousarray(greys.normalise(sections[needed.slices(read.start)]))
    return Tile(box, greys_of_tile, below - needed.start[0], t)


def _wanted(plan: Plan, tile: Triple, piece: Box, fills: Mapping[Triple, float]) -> bool:
    """Whether a tile has anything to give: planes that are not copies of sections, in cells that are not empty."""
    cell = cell_box(tile, plan.tiling.core)
    if plan.mode.axial.copied(np.arange(cell.start[0], cell.stop[0])).all():
        return False
    return not _all_empty(plan, plan.tiling.reach_box(tile) & piece, fills)


def _all_empty(plan: Plan, box: Box, fills: Mapping[Triple, float]) -> bool:
    return bool(fills) and all(cell in fills for cell in cells_meeting(box, plan.tiling.core))


def _fill_empty(plan: Plan, piece: Box, fills: Mapping[Triple, float], part: NDArray[Any]) -> None:
    """Write empty cells over whatever is there, copied sections included."""
    if fills:
        for cell in cells_meeting(piece, plan.tiling.core):
            if cell in fills:
                inside = (cell_box(cell, plan.tiling.core) & piece).slices(piece.start)
                part[(0, *inside)] = fills[cell]
                part[(1, *inside)] = 0


def _copy_sections(plan: Plan, piece: Box, sections: NDArray[Any], read: Box, part: NDArray[Any]) -> None:
    """Planes on a good section are that section, and certain if they were measured, not mirrored, there."""
    axial, planes = plan.mode.axial, np.arange(piece.start[0], piece.stop[0])
    _, y, x = piece.slices(read.start)
    number, _ = axial.locate(planes)
    measured = axial.measured(planes)
    for k in np.flatnonzero(axial.copied(planes)):
        part[0, k] = sections[int(number[k]) - read.start[0], y, x]
        if measured[k]:
            part[1, k] = 0
