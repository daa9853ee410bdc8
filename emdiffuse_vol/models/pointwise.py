"""Convolutions of one pixel, as matrix products over channels.

The same bits with any number of threads: oneDNN's own 1x1 convolutions to few channels add in an order that depends on
it, and a run may be continued by machines with other numbers of cores.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def pointwise(x: Tensor, conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    """[n, c, y, x], best channels last -> [n, o, y, x]."""
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


class Pointwise(nn.Conv2d):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self)
