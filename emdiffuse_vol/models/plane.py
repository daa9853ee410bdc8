"""PlaneNet: one plane at a time, for any factor; SlabNet without its convolutions along z.

Convention: as in ``slab``; planes of a slab are computed side by side and know nothing of each other, so they need not
agree where the sections leave a choice. It sees two sections on either side of a plane, ``HALO`` = (0, 32, 32) voxels
far, and commutes with shifts by 4 pixels in XY and with any choice or order of planes. About 6.5e4 FLOP per voxel for
the mean and 7e3 for each member: the cheapest of our networks, and the one to take where a few planes are wanted.
"""

from __future__ import annotations

from emdiffuse_vol.models import slab


class PlaneNet(slab.SlabNet):
    """``width`` channels at half resolution, ``deep`` at a quarter."""

    DEEP = 1
