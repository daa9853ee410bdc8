"""SlabNet a few planes at a time: the numbers of ``SlabNet.trunk`` and ``spread``, in memory that does not grow with z.

Convention: planes are [z, c, y, x], channels last; a slice of them enters, and what can be known by then comes out. No
convolution is padded: each layer computes what the next one needs and nothing else, so of a tile with its ``HALO`` the
core comes out, to rounding what the padded network gives there. A convolution over three planes is one over their
channels, stacked: all are two-dimensional, which every library does well. Slices are small, so that what lies between
layers stays in the cache, and in memory that the allocator does not hand back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emdiffuse_vol.models.pointwise import pointwise

if TYPE_CHECKING:
    from emdiffuse_vol.models.slab import Block, SlabNet

NOISE_MARGIN = 8  # pixels beyond the core, on each side, that noise is needed of

Features = Callable[[slice], Tensor]  # planes of a tile -> [z, 5, y, x]
Planes = Iterator[tuple[slice, Tensor, Tensor, Tensor]]
Gates = tuple[Tensor, Tensor]


def features_margin(net: SlabNet) -> int:
    """Pixels beyond the core, on each side, that features are needed of."""
    return 14 + 8 * len(net.middle)


def trunk(net: SlabNet, features: Features, t: Tensor, gap: float | Tensor, step: int) -> Planes:
    """What is known after each ``step`` planes of the tile: which planes of the core, their mean [z, 1, y, x], and fine
    [z, c, y / 2 + 2, x / 2 + 2] and coarse [z, c, y / 4 + 2, x / 4 + 2] features.

    features: of the core grown by the network's halo in z and :func:`features_margin` in y and x; t, gap: of all these
    planes, as in :meth:`SlabNet.trunk`.
    """
    embedding = net.embedding(t, gap)
    reach = net.DEEP // 2
    layers = [net.enter, *net.middle, net.leave]
    enter, *middle, leave = (_Block(block, embedding, (k + 1) * reach) for k, block in enumerate(layers))
    skipped, waiting, linear = _Late(len(middle) * reach), _Late(reach), _Late(len(layers) * reach)
    done = 0
    for start in range(0, len(t), step):
        given = features(slice(start, start + step))
        linear.push(_crop(given[:, :1], features_margin(net)))
        h = enter(_convolve(F.pixel_unshuffle(given, 2), net.inp))
        skipped.push(_crop(h, 1 + 4 * len(middle)))
        coarse = _convolve(h, net.down)
        for block in middle:
            coarse = block(coarse)
        waiting.push(_crop(coarse, 1))
        if len(coarse):
            fine = leave(_crop(_double(_convolve(coarse, net.up)), 1).add_(skipped.take(len(coarse))))
            if n := len(fine):
                residual = F.pixel_shuffle(_convolve(F.silu(fine), net.out), 2)
                yield slice(done, done + n), linear.take(n) + residual, fine, waiting.take(n)
                done += n


def gates(net: SlabNet, fine: Tensor, coarse: Tensor) -> Gates:
    """As :meth:`SlabNet.gates`, of what :func:`trunk` gives, with 1 added to what noise is multiplied by."""
    both = _convolve(F.silu(fine), net.fine_gate), _convolve(F.silu(coarse), net.coarse_gate)
    for gate in both:
        gate[:, : gate.shape[1] // 2] += 1
    return both


def spread(net: SlabNet, gates: Gates, noise: Tensor) -> Tensor:
    """As :meth:`SlabNet.spread`. noise: [z, 2, y, x], of the gates' planes grown by what a convolution reaches in z and
    by ``NOISE_MARGIN`` in y and x."""
    (fine_scale, fine_shift), (coarse_scale, coarse_shift) = (gate.chunk(2, dim=1) for gate in gates)
    cells = F.avg_pool2d(noise, 4).flip(1) * 4
    h = torch.addcmul(coarse_shift, _convolve(cells, net.coarse_noise), coarse_scale)
    h = _crop(_double(_convolve(F.silu(h, inplace=True), net.coarse_up)), 1)
    h = h + _convolve(F.pixel_unshuffle(_crop(noise[:, :1], 4), 2), net.fine_noise)
    h = torch.addcmul(fine_shift, h, fine_scale)
    h = _convolve(F.silu(h, inplace=True), net.mix)
    return F.pixel_shuffle(_convolve(F.silu(h, inplace=True), net.member_out), 2)


class _Block:
    """``slab.Block`` for planes that arrive one after the other; ``first`` is the tile's plane that comes out first."""

    def __init__(self, block: Block, embedding: Tensor, first: int) -> None:
        self.block, self.next = block, first
        scale, self.shift = block.film(embedding)[:, :, None, None].chunk(2, dim=1)
        self.scale = 1 + scale
        self.reach = block.first.kernel_size[0] // 2
        self.kept: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[z, c, y, x] -> [z, c, y - 4, x - 4], the first time fewer planes by what the block reaches."""
        if self.kept is not None:
            x = torch.cat([self.kept, x])
        if self.reach:
            self.kept = x[-2 * self.reach :]
        if (n := len(x) - 2 * self.reach) <= 0:
            return _crop(x[:0], 2)
        planes = slice(self.next, self.next + n)
        self.next += n
        h = _convolve(F.silu(x), self.block.first)
        h = torch.addcmul(self.shift[planes], h, self.scale[planes])
        h = _convolve(F.silu(h, inplace=True), self.block.second)
        return h.add_(_crop(x[self.reach : self.reach + n], 2))


class _Late:
    """Planes that wait for others to be computed; the first ``lag`` of them wait in vain."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.planes: deque[Tensor] = deque()

    def push(self, planes: Tensor) -> None:
        surplus = min(self.lag, len(planes))
        self.lag -= surplus
        self.planes.extend(planes[surplus:].unbind())

    def take(self, n: int) -> Tensor:
        return torch.stack([self.planes.popleft() for _ in range(n)])


def _crop(x: Tensor, pixels: int) -> Tensor:
    return x[..., pixels:-pixels, pixels:-pixels]


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _convolve(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """Without padding: [z, c, y, x] -> fewer planes and pixels, by what the kernel reaches."""
    if prod(conv.kernel_size) == 1:
        return pointwise(x, conv)
    depth = conv.kernel_size[0]
    if depth > 1:
        x = torch.cat([x[k : len(x) - depth + 1 + k] for k in range(depth)], dim=1)
    weight = conv.weight.transpose(1, 2).flatten(1, 2)
    return F.conv2d(x, weight, conv.bias, conv.stride[1:])
