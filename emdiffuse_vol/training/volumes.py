"""Volumes to train on: greys on an isotropic grid, and which of them were measured.

Convention: greys are [z, y, x] float32, normalised. An isotropic volume is measured everywhere, and planes may be
hidden along any of its axes. Of an anisotropic stack (vEMDiffuse-a) every section is a plane of the isotropic grid,
and the planes between are unknown: they are filled in, first by linear interpolation and later by the network that is
being trained, so that it does not learn to expect coarse rows; planes are hidden along y or x alone, where truth
exists, and only measured voxels enter a loss or a score.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from emdiffuse_vol.geometry.boxes import reflect
from emdiffuse_vol.metrics.interpolation import linear
from emdiffuse_vol.models.slab import STRIDE, SlabNet, slab_features

FloatArray = NDArray[np.float32]
STRIP = 64  # rows computed at a time where a whole volume is


@dataclass(frozen=True)
class TrainingVolume:
    """known: broadcastable to the greys, 1 where they were measured; axes: those along which planes may be hidden."""

    greys: FloatArray
    known: FloatArray
    axes: tuple[int, ...] = (0, 1, 2)

    @property
    def measured(self) -> FloatArray:
        """``known`` in the shape of the greys."""
        return np.broadcast_to(self.known, self.greys.shape)

    @property
    def lateral_extent(self) -> int:
        """Pixels along the shortest axis that may lie in a section."""
        shape = self.greys.shape
        return min(int(shape[axis]) for axis in range(3) if self.axes != (axis,))

    def axes_for(self, factor: int) -> tuple[int, ...]:
        """Axes long enough to hide planes between sections ``factor`` apart."""
        return tuple(axis for axis in self.axes if self.greys.shape[axis] > factor)

    def turned(self, axes: tuple[int, ...]) -> TrainingVolume:
        """With its axes in another order, the first playing z. A view."""
        return TrainingVolume(self.greys.transpose(axes), self.measured.transpose(axes), (0,))

    def part(self, where: tuple[slice, ...]) -> TrainingVolume:
        return TrainingVolume(self.greys[where], self.measured[where], self.axes)


def isotropic_volume(greys: FloatArray) -> TrainingVolume:
    return TrainingVolume(greys, np.ones((1, 1, 1), np.float32))


def lateral_volume(sections: FloatArray, factor: int) -> TrainingVolume:
    """sections: [s, y, x], ``factor`` lateral pixels apart."""
    greys = linear(sections, factor)
    known = (np.arange(len(greys)) % factor == 0).astype(np.float32)[:, None, None]
    return TrainingVolume(greys, known, (1, 2))


def coarse_volume(sections: FloatArray, rows: int) -> TrainingVolume:
    """As published: planes XZ and YZ with their coarse rows, mirrored to at least ``rows`` sections."""
    greys = sections[reflect(np.arange(max(rows, len(sections))), len(sections))]
    return TrainingVolume(greys, np.ones((1, 1, 1), np.float32), (1, 2))


def refill(net: SlabNet, volume: TrainingVolume, factor: int, generator: torch.Generator | None) -> TrainingVolume:
    """Unknown planes of a lateral volume as ``net`` sees them: its mean, or with a generator one of its members."""
    sections = volume.greys[::factor]
    mean, members = predict_volume(net, sections, factor, generator, 0 if generator is None else 1)
    greys = mean if generator is None else members[0]
    greys[::factor] = sections
    return replace(volume, greys=greys)


def predict_volume(
    net: SlabNet, sections: FloatArray, factor: int, generator: torch.Generator | None = None, members: int = 0
) -> tuple[FloatArray, FloatArray]:
    """A small stack [s, y, x] -> mean [z, y, x] and members [k, z, y, x], mirrored at its faces. Measured planes are
    not copied in. For stacks in memory; what users run is ``reconstruct``."""
    depth, (_, height, width), (deep, halo, _) = (len(sections) - 1) * factor + 1, sections.shape, net.HALO
    device = next(net.parameters()).device
    planes = torch.arange(-deep, depth + deep, device=device)
    first, last = -deep // factor - 1, (depth + deep) // factor + 2  # sections, context among them
    index = planes.div(factor, rounding_mode="floor") - first
    t = planes % factor / factor
    around = reflect(np.arange(first, last + 1), len(sections))
    columns = reflect(np.arange(-halo, -(-width // STRIDE[2]) * STRIDE[2] + halo), width)
    mean = np.empty((depth, height, width), np.float32)
    several = np.empty((members, depth, height, width), np.float32)
    with torch.inference_mode():
        for top in range(0, height, STRIP):
            rows = reflect(np.arange(top - halo, top + STRIP + halo), height)
            images = torch.from_numpy(sections[np.ix_(around, rows, columns)]).to(device)[None]
            guess, fine, coarse = net.trunk(slab_features(images, index, t), t, float(factor))
            gates = net.gates(fine, coarse)
            inner = (slice(deep, deep + depth), slice(halo, halo + min(STRIP, height - top)), slice(halo, halo + width))
            mean[:, top : top + STRIP] = guess[0, 0][inner].cpu()
            for k in range(members):
                noise = torch.randn((1, 2, *guess.shape[2:]), generator=generator).to(device)
                several[k, :, top : top + STRIP] = (guess + net.spread(gates, noise))[0, 0][inner].cpu()
    return mean, several
