"""From sections to mean and members: networks applied to tiles, tiles put together to blocks.

Convention: greys are normalised (see ``greys``); a predictor takes tiles of one fixed shape and returns, for each,
the mean [z, y, x] and K members [k, z, y, x] of what the tile contributes to (see ``Tiling.reach_box``), as tensors on
its device: sums, spread and codes are computed there, and what comes back is what will be stored. A tile's result
depends on the tile alone, not on the block, the batch or the process that computes it. Members are put together first
and compared afterwards, so the spread has no dip where tiles overlap.

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
from torch import Tensor

from emdiffuse_vol.errors import BlockError
from emdiffuse_vol.geometry.boxes import Box, Triple, cell_box, cells_meeting
from emdiffuse_vol.geometry.tiles import Tiling
from emdiffuse_vol.reconstruct.greys import Codes, FloatArray, GreyMap, SectionMap
from emdiffuse_vol.reconstruct.plan import Block, Plan

# Normalised greys by which tissue differs from other tissue, root mean square: 0.73 in FIB-25, 0.69 in the VNC stack,
# between places 8 sections apart.
UNKNOWN = 0.7

# How PyTorch and the libraries below it say on the CPU, or outside its allocator, what OutOfMemoryError says elsewhere.
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "could not create a memory")


NOT_EVENED = SectionMap()


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

    def __call__(self, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
        """At most ``batch`` tiles -> mean [n, z, y, x], members [n, k, z, y, x], float32."""
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
    evening: SectionMap = NOT_EVENED,
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

    def make(tile: Triple) -> Tile:
        return _tile(plan, tile, sections, block.read, greys, evening)

    for piece, tiles in plan.pieces(block.write):
        part = result[(slice(None), *piece.slices(block.write.start))]
        if not _all_empty(plan, piece, fills):
            wanted = [tile for tile in tiles if _wanted(plan, tile, piece, fills)]
            try:
                mean, members = _put_together(plan, piece, predictor.members, _run(predictor, wanted, make))
            except BlockError as error:
                raise BlockError(f"block {block.index} ({block.write}): {error}") from None
            spread = _uncertainty(plan, piece, mean, members, predictor, scale)
            place = plan.mode.axial.locate(np.arange(piece.start[0], piece.stop[0]))
            part[0] = codes.mean(evening.undo(greys.restore(mean), *place)).cpu().numpy()
            part[1] = codes.uncertainty(evening.undo_spread(greys.restore_spread(spread), *place)).cpu().numpy()
            _copy_sections(plan, piece, sections, block.read, part)
        _fill_empty(plan, piece, fills, part)
    return result


def _run(
    predictor: Predictor, tiles: list[Triple], make: Callable[[Triple], Tile]
) -> Iterator[tuple[Triple, Tensor, Tensor]]:
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
            if not (mean.isfinite().all() and members.isfinite().all()):
                raise BlockError("the network gave NaN or infinity; not written")
            _check_output(given, mean)
            yield tile, mean, members
        done, again = done + len(batch), False


def _attempt(predictor: Predictor, batch: list[Tile]) -> tuple[Tensor, Tensor] | None:
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


def _check_output(tile: Tile, mean: Tensor) -> None:
    """A constant output from the network is a failure, not data, unless what it was made of is as empty: a few specks
    may be lost on the way."""
    if mean.min() == mean.max():
        first = (len(tile.index) - len(mean)) // 2
        index = tile.index[first : first + len(mean)]
        near = tile.sections[np.union1d(index, index + 1).clip(max=len(tile.sections) - 1)]
        # The part of the sections that lies under the mean; tiles have the same margin on both sides.
        height, width = (s * n // m for s, n, m in zip(near.shape[1:], mean.shape[1:], tile.box.shape[1:], strict=True))
        top, left = (near.shape[1] - height) // 2, (near.shape[2] - width) // 2
        near = near[:, top : top + height, left : left + width]
        if np.mean(near != np.median(near)) > 0.01:
            raise BlockError(f"the network gave one grey for all of tile {tile.box}, whose input is not; not written")


def _put_together(
    plan: Plan, piece: Box, count: int, outputs: Iterator[tuple[Triple, Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Mean [z, y, x] and members [k, z, y, x] of a piece of a block, from all tiles that contribute to it."""
    mean, members = torch.zeros(piece.shape), torch.zeros((count, *piece.shape))
    window = torch.from_numpy(plan.tiling.window()) if plan.tiling.blend else None
    for tile, best, drawn in outputs:
        reach = plan.tiling.reach_box(tile)
        part = reach & piece
        inside, target = part.slices(reach.start), part.slices(piece.start)
        if window is None:  # one tile is all
            return best[inside], drawn[(slice(None), *inside)]
        mean, members, window = (values.to(best.device) for values in (mean, members, window))
        mean[target] += window[inside] * best[inside]
        members[(slice(None), *target)] += window[inside] * drawn[(slice(None), *inside)]
    return mean, members


def _uncertainty(
    plan: Plan, piece: Box, mean: Tensor, members: Tensor, predictor: Predictor, scale: float | Mapping[int, float]
) -> Tensor:
    """Calibrated spread of the members about the mean, normalised greys [z, y, x]."""
    variance = torch.zeros_like(mean)
    for member in members:
        deviation = member - mean
        variance.addcmul_(deviation, deviation)
    spread = variance.div_(predictor.members - predictor.lost).sqrt_()
    planes = np.arange(piece.start[0], piece.stop[0])
    scales = [scale[int(n)] if isinstance(scale, Mapping) else scale for n in plan.mode.axial.span(planes)]
    spread *= torch.tensor(scales, device=spread.device)[:, None, None]
    beyond = torch.from_numpy(plan.mode.axial.beyond(planes))
    spread[beyond] = spread[beyond].clamp(min=UNKNOWN)
    return spread


def _tile(plan: Plan, index: Triple, sections: NDArray[Any], read: Box, greys: GreyMap, evening: SectionMap) -> Tile:
    box = plan.tiling.input_box(index)
    needed = plan.mode.read_box(box)
    below, t = plan.mode.axial.locate(np.arange(box.start[0], box.stop[0]))
    even = evening.even(sections[needed.slices(read.start)], needed.start[0])
    greys_of_tile = np.ascontiguousarray(greys.normalise(even))
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
