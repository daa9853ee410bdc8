"""A few ratios of speed in well under a minute, printed at the end of every check so that their history can be read.

    python benchmarks/smoke.py

Nothing fails here: what a shared machine's clock says proves little, and ratios of things timed side by side a little
more. Everything is of ``performance.py``, on one core.
"""

from __future__ import annotations

import performance
import torch
from performance import Case, cost, product

from emdiffuse_vol.geometry.boxes import Box
from emdiffuse_vol.reconstruct.device import Device
from emdiffuse_vol.reconstruct.noise import NoiseField


def main() -> None:
    torch.set_num_threads(1)
    performance.REPEATS = 1
    case, peak = Case(), product()
    padded, streamed = case.padded(), case.streamed(Device("cpu", "float32"))
    box = Box.of(performance.CORE)
    noise = cost(lambda: [NoiseField(0).normal(k, 0, box, 2) for k in range(performance.MEMBERS)])
    whole, network, around = (spent["user"] + spent["system"] for spent in (padded, streamed, noise))
    print(f"padded over streamed {whole / network:.2f}")
    print(f"network over matrix product {streamed['flop'] / network / peak:.2f}")
    print(f"kernel's share of the network {streamed['system'] / network:.3f}")
    print(f"noise over network {around / network:.3f}")


if __name__ == "__main__":
    main()
