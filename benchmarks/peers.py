"""`emdvol reconstruct` beside MONAI, dask and daisy: one network, one volume, one tiling, two cores.

    python -m pip install -c constraints.txt -e ".[dev,peers]"
    python benchmarks/peers.py benchmarks/results/peers.json [--quick]

Every method reads the same unsharded Zarr and writes mean and uncertainty (uint8, 2 channels) to the same sharded Zarr
v3: a small SlabNet with random weights, four members, the same noise at the same voxel, float32, the same tiles with
the same halo, one tile per shard, zstd and a checksum per chunk. Peers are used as their documentation shows, and are
given for nothing what they lack: the grey map, the noise, mirrored faces, and the copying of measured sections
(``Network`` below). Ours is the command a user runs, with its survey of greys, fsync, ledger and pyramid.

Conventions. A run is a process group of its own on two cores; its seconds count from the start of the process, and
``imports`` says how many of them the same interpreter needs to import what the method imports; ``cpu_seconds`` are of
all its processes, and depend less on what else the machine does. Memory is the largest sum of proportional set sizes
over the group, sampled every 0.1 s. Bytes read are those of the input's chunks, as often as they leave the store:
counted by a wrapper of zarr's LocalStore for peers, and by an HTTP server, in a run of its own, for ours. The first
block is there when the first shard has its final name; only ours is then on disk for certain, since zarr-python never
calls fsync. For ``redone`` the group is killed (SIGKILL) when half of the work is done, in the middle of a tile, and
the same command is run again: it is the share of the work before the kill that was done again, counted in members of
tiles. Differences are in stored codes, from the whole volume computed as one tile.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

FACTOR, NM = 8, 10
MEMBERS, SEED = 4, 0
SIZES = {"width": 8, "deep": 12}  # of the SlabNet
CHUNK = (64, 64, 64)
CORES = 2
SECTIONS_AROUND = (2, 3)  # what a tile of whole sections needs below and above it, halo included
TICKS, READS = (
    "PEERS_TICKS",
    "PEERS_READS",
)  # environment: files that get a line for each member of a tile, each chunk read
PACKAGES = ("torch", "numpy", "zarr", "tensorstore", "monai", "dask", "daisy")


@dataclass(frozen=True)
class Case:
    """sections: [s, y, x] of the input; tile: output voxels [z, y, x] of a tile, a block and a shard."""

    sections: tuple[int, int, int]
    tile: tuple[int, int, int]
    rounds: int

    @property
    def output(self) -> tuple[int, int, int]:
        s, y, x = self.sections
        return (s - 1) * FACTOR + 1, y, x

    @property
    def blocks(self) -> tuple[int, int, int]:
        z, y, x = (-(-n // t) for n, t in zip(self.output, self.tile, strict=True))
        return z, y, x

    def shards(self, folder: Path) -> list[Path]:
        return [output_path(folder) / "c" / "0" / "/".join(map(str, i)) for i in np.ndindex(*self.blocks)]


FULL = Case((32, 384, 384), (64, 128, 128), rounds=2)
QUICK = Case((12, 128, 128), (64, 64, 64), rounds=1)


# --- What all methods share ------------------------------------------------------------------------------------------


class Network:
    """The network on a window of the output, and its values as stored: what a user of a peer has to bring."""

    def __init__(self, folder: Path, case: Case) -> None:
        import torch
        from safetensors.torch import load_file

        from emdiffuse_vol.geometry.axial import AxialGrid
        from emdiffuse_vol.models.slab import SlabNet
        from emdiffuse_vol.modes import Isotropic
        from emdiffuse_vol.reconstruct.greys import Codes, GreyMap
        from emdiffuse_vol.reconstruct.noise import NoiseField

        count_members()
        net = SlabNet(**SIZES).eval().requires_grad_(False)
        net.load_state_dict(load_file(folder / "w.safetensors"))
        self.net = net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.mode = Isotropic(case.sections, AxialGrid(case.sections[0], Fraction(FACTOR)), float(FACTOR))
        self.greys, self.codes, self.noise = GreyMap(*read_greys(folder)), Codes("uint8"), NoiseField(SEED)

    def values(self, greys: np.ndarray, box: Any) -> Any:
        """greys: stored, of ``mode.read_box(box)``; -> tensor [2, z, y, x], mean and spread, normalised."""
        import torch

        from emdiffuse_vol.models.slab import slab_features

        below, relative = self.mode.axial.locate(np.arange(box.start[0], box.stop[0]))
        index = torch.as_tensor(below - self.mode.read_box(box).start[0])
        t, sections = torch.as_tensor(relative), torch.as_tensor(self.greys.normalise(greys))
        with torch.inference_mode():
            features = slab_features(sections[None], index, t)
            mean, fine, coarse = self.net.trunk(features, t, self.mode.gap)
            gates = self.net.gates(fine, coarse)
            del features, fine, coarse
            squares = torch.zeros_like(mean)
            for k in range(MEMBERS):
                noise = torch.as_tensor(self.noise.normal(k, 0, box, channels=2))[None]
                squares += self.net.spread(gates, noise).square_()
            return torch.cat([mean[0], (squares[0] / MEMBERS).sqrt_()])

    def stored(self, values: np.ndarray, greys: np.ndarray, box: Any) -> np.ndarray:
        """values: [2, z, y, x] of ``box``; greys: the input's sections at the planes of ``box`` that were measured."""
        result = np.stack(
            [
                self.codes.mean(self.greys.restore(values[0])),
                self.codes.uncertainty(self.greys.restore_spread(values[1])),
            ]
        )
        measured = self.mode.axial.measured(np.arange(box.start[0], box.stop[0]))
        result[0, measured], result[1, measured] = greys, 0
        return result

    def block(self, greys: np.ndarray, core: Any) -> np.ndarray:
        """greys: stored, of ``window(core)``'s read box -> codes [2, z, y, x] of ``core``: a tile, cropped."""
        box = self.window(core)
        read = self.mode.read_box(box)
        values = self.values(greys, box)[(slice(None), *core.slices(box.start))].numpy()
        first = -(-core.start[0] // FACTOR) - read.start[0]
        z = slice(first, first + -(-core.shape[0] // FACTOR))
        _, y, x = core.slices((0, *read.start[1:]))
        return self.stored(values, greys[z, y, x], core)

    def window(self, core: Any) -> Any:
        from emdiffuse_vol.models.slab import HALO, STRIDE

        # Cells cut by the volume's face are computed up to the network's stride.
        up = [-(-n // s) * s for n, s in zip(core.shape, STRIDE, strict=True)]
        stop = tuple(a + n for a, n in zip(core.start, up, strict=True))
        return type(core)(core.start, stop).grow(HALO)


def count_members() -> None:
    """Where ``TICKS`` is set, append a line to that file whenever a member of a tile is computed."""
    from emdiffuse_vol.models.slab import SlabNet

    if not (path := os.environ.get(TICKS)) or hasattr(SlabNet.spread, "counted"):
        return
    spread = SlabNet.spread

    @functools.wraps(spread)
    def counted(self: Any, *args: Any) -> Any:
        result = spread(self, *args)
        if not result.is_meta:  # a count of operations
            append(path, "member")
        return result

    counted.counted = True  # type: ignore[attr-defined]
    SlabNet.spread = counted  # type: ignore[method-assign]


def append(path: str, line: str) -> None:
    """One write to a file opened for appending: whole lines, also from several processes, also when killed."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def read_greys(folder: Path) -> tuple[float, float]:
    low, high = json.loads((folder / "greys.json").read_text())
    return low, high


def mirrored(volume: Any, box: Any) -> np.ndarray:
    """Greys of a box that may reach outside the volume, mirrored at its faces: numpy's own ``reflect``."""
    inside = [slice(max(0, a), min(n, b)) for a, b, n in zip(box.start, box.stop, volume.shape, strict=True)]
    outside = [(max(0, -a), max(0, b - n)) for a, b, n in zip(box.start, box.stop, volume.shape, strict=True)]
    return np.pad(volume[tuple(inside)], outside, mode="reflect")


def open_input(folder: Path) -> Any:
    """The input as a zarr.Array, whose reads of chunks are noted in the file ``READS``."""
    import zarr
    from zarr.storage import LocalStore, WrapperStore

    path = os.environ.get(READS)

    class Counted(WrapperStore):  # type: ignore[type-arg]
        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            value = await super().get(key, prototype, byte_range)
            if path and value is not None and key.startswith("c/"):
                append(path, str(len(value)))
            return value

    return zarr.open_array(Counted(LocalStore(folder / "in.zarr" / "0", read_only=True)), mode="r")


def open_output(folder: Path, case: Case) -> Any:
    """The sharded output as a zarr.Array; one that is there is continued."""
    import zarr

    path = output_path(folder)
    if (path / "zarr.json").exists():
        return zarr.open_array(path, mode="r+")
    return zarr.create_array(path, **output_array(case))


def output_path(folder: Path) -> Path:
    return folder / "out.zarr" / "0"


def output_array(case: Case) -> dict[str, Any]:
    """The array that our command writes, in the words of zarr.create_array."""
    from zarr.codecs import Crc32cCodec, ZstdCodec

    return {
        "shape": (2, *case.output),
        "dtype": "uint8",
        "chunks": (2, *CHUNK),
        "shards": (2, *case.tile),
        "compressors": (ZstdCodec(level=3), Crc32cCodec()),
    }


# --- The methods, each in a process of its own -----------------------------------------------------------------------


def ours(folder: Path, case: Case) -> None:
    """The command of a user, with its members counted."""
    count_members()
    sys.argv = our_command(folder, case)[2:]
    runpy.run_module("emdiffuse_vol", run_name="__main__")


def our_command(folder: Path, case: Case, url: str | None = None) -> list[str]:
    tile = ",".join(map(str, case.tile))
    settings = ["--weights", str(folder / "w.safetensors"), "--tile", tile, "--shard", tile, "--members", str(MEMBERS)]
    settings += ["--seed", str(SEED), "--device", "cpu", "--precision", "float32"]
    settings += ["--executor", "local", "--workers", str(CORES)]
    paths = [url or str(folder / "in.zarr"), "--out", str(folder / "out.zarr")]
    return [sys.executable, "-m", "emdiffuse_vol", "reconstruct", *paths, *settings]


def monai(folder: Path, case: Case, core_only: bool = False) -> None:
    """SlidingWindowInferer with Gaussian weights over the whole output in memory, then one write.

    The windows lie on the output grid; ``with_coord`` tells the network which, and it takes their sections itself, so
    the ``inputs`` that MONAI slices are a view of one zero and cost nothing. core_only: the weights are 1 in a
    window's core and 0 in its halo, by the attribute behind ``cache_roi_weight_map``.
    """
    import torch
    from monai.inferers import SlidingWindowInferer

    from emdiffuse_vol.geometry.boxes import Box
    from emdiffuse_vol.models.slab import HALO

    network, volume = Network(folder, case), open_input(folder)[:]
    # Faces are mirrored beyond the volume, so that MONAI has true surroundings there too; windows start at the mirror.
    cells = tuple(n * t for n, t in zip(case.blocks[1:], case.tile[1:], strict=True))
    whole = Box.of((case.output[0], *cells)).grow(HALO)
    stack = mirrored(volume, network.mode.read_box(whole))
    first = network.mode.read_box(whole).start
    roi = tuple(t + 2 * h for t, h in zip(case.tile, HALO, strict=True))

    def predict(_: torch.Tensor, place: Any) -> torch.Tensor:
        box = Box(tuple(s.start for s in place[0][2:]), tuple(s.stop for s in place[0][2:])).shift(whole.start)
        return network.values(stack[network.mode.read_box(box).slices(first)], box)[None]

    # The step is int(roi * (1 - overlap)); the half makes it the core whatever the rounding.
    overlap = tuple((2 * h - 0.5) / n for h, n in zip(HALO, roi, strict=True))
    inferer = SlidingWindowInferer(roi, sw_batch_size=1, overlap=overlap, mode="gaussian", with_coord=True)
    if core_only:
        inferer.roi_weight_map = torch.zeros(1, 1, *roi)
        inferer.roi_weight_map[(..., *(slice(h, h + t) for h, t in zip(HALO, case.tile, strict=True)))] = 1
    with torch.inference_mode():
        values = inferer(torch.zeros(1).expand(1, 1, *whole.shape), predict)[0].numpy()
    values = values[(slice(None), *Box.of(case.output).slices(whole.start))]
    array = open_output(folder, case)
    for z in range(0, case.output[0], case.tile[0]):
        slab = Box((z, 0, 0), (min(z + case.tile[0], case.output[0]), *case.output[1:]))
        sections = volume[-(-z // FACTOR) : (slab.stop[0] - 1) // FACTOR + 1]
        array[(slice(None), *slab.slices())] = network.stored(values[:, z : slab.stop[0]], sections, slab)


def dask(folder: Path, case: Case) -> None:
    """map_overlap over the sections, one chunk of them per tile, and to_zarr; the threaded scheduler.

    The function makes FACTOR planes of each section, so the graph holds stored greys only, as dask's own guide to
    memory has it. dask's "reflect" repeats the border voxel and takes no asymmetric depth: da.pad mirrors instead.
    to_zarr makes the array: given one that exists it rechunks to "auto", and two tasks may then write to one shard.
    """
    import dask
    import dask.array as da

    from emdiffuse_vol.geometry.boxes import Box
    from emdiffuse_vol.models.slab import HALO

    network = Network(folder, case)
    sections = da.from_zarr(open_input(folder))
    around = (SECTIONS_AROUND, (HALO[1], HALO[1]), (HALO[2], HALO[2]))
    core = (case.tile[0] // FACTOR, *case.tile[1:])
    chunks, planes = [], []
    for n, size, pad, scale, end in zip(case.sections, core, around, (FACTOR, 1, 1), case.output, strict=True):
        cells = [min(size, n - i) for i in range(0, n, size)]
        planes.append(tuple(min(c * scale, end - i * size * scale) for i, c in enumerate(cells)))
        cells[0], cells[-1] = cells[0] + pad[0], cells[-1] + pad[1]
        chunks.append(tuple(cells))

    def predict(greys: np.ndarray, block_info: Any = None) -> np.ndarray:
        _, *place = block_info[None]["array-location"]
        cell = Box(tuple(a for a, _ in place), tuple(b for _, b in place))
        needed = network.mode.read_box(network.window(cell)).shape
        return network.block(greys[tuple(slice(n) for n in needed)], cell)

    codes = da.map_overlap(
        predict,
        da.pad(sections, around, mode="reflect").rechunk(tuple(chunks)),
        depth=dict(enumerate(around)),
        boundary="none",
        trim=False,
        new_axis=0,
        chunks=((2,), *planes),
        dtype="uint8",
        meta=np.empty((0, 0, 0, 0), "uint8"),
    )
    with dask.config.set(scheduler="threads", num_workers=CORES):
        da.to_zarr(codes, str(output_path(folder)), overwrite=True, **output_array(case))


def daisy(folder: Path, case: Case) -> None:
    """Task with read and write ROIs in nanometres, a worker function that loads the network once, and done markers."""
    import daisy

    from emdiffuse_vol.models.slab import HALO

    open_output(folder, case)
    tile, size = daisy.Coordinate(case.tile), daisy.Coordinate((NM, NM, NM))
    below = daisy.Coordinate((SECTIONS_AROUND[0] * FACTOR, *HALO[1:])) * size
    above = daisy.Coordinate((SECTIONS_AROUND[1] * FACTOR, *HALO[1:])) * size
    write, whole = daisy.Roi((0, 0, 0), tile * size), daisy.Roi((0, 0, 0), daisy.Coordinate(case.output) * size)

    def worker() -> None:
        from emdiffuse_vol.geometry.boxes import Box

        network, volume, array = Network(folder, case), open_input(folder), open_output(folder, case)
        client = daisy.Client()
        while True:
            with client.acquire_block() as block:
                if block is None:
                    return
                roi = block.write_roi / size
                core = Box(tuple(roi.begin), tuple(roi.end))
                greys = mirrored(volume, network.mode.read_box(network.window(core)))
                array[(slice(None), *core.slices())] = network.block(greys, core)

    task = daisy.Task(
        "reconstruct",
        total_roi=whole.grow(below, above),
        read_roi=write.grow(below, above),
        write_roi=write,
        process_function=worker,
        read_write_conflict=False,
        fit="shrink",
        max_workers=CORES,
        tracking_path=str(folder / "out.zarr" / "daisy"),
    )
    if not daisy.run_blockwise([task], progress=False):
        sys.exit("daisy left blocks undone")


def untiled(folder: Path, case: Case) -> None:
    """The whole volume as one tile: what every method is compared with."""
    from emdiffuse_vol.geometry.boxes import Box

    network, volume = Network(folder, case), open_input(folder)[:]
    whole = Box.of(case.output)
    greys = mirrored(volume, network.mode.read_box(network.window(whole)))
    np.save(folder / "untiled.npy", network.block(greys, whole))


@dataclass(frozen=True)
class Method:
    run: Callable[[Path, Case], None]
    package: str
    imports: str
    threads: int | None  # of torch, by OMP_NUM_THREADS; None: the method's own choice
    how: str


OUR_IMPORTS = "import emdiffuse_vol.cli.main, emdiffuse_vol.cli.reconstruct, emdiffuse_vol.reconstruct.run"
PEER_IMPORTS = "import torch, zarr, safetensors.torch, emdiffuse_vol.models.slab, emdiffuse_vol.reconstruct.noise"
METHODS = {
    "ours": Method(
        ours, "emdiffuse_vol", OUR_IMPORTS, None, "emdvol reconstruct --executor local --workers 2, pyramid included"
    ),
    "monai": Method(
        monai,
        "monai",
        f"{PEER_IMPORTS}, monai.inferers",
        CORES,
        "SlidingWindowInferer(mode='gaussian', with_coord=True), overlap = two halos, whole volume, then zarr",
    ),
    "dask": Method(
        dask, "dask", f"{PEER_IMPORTS}, dask.array", 1, "da.map_overlap + da.to_zarr, threaded scheduler, 2 threads"
    ),
    "daisy": Method(
        daisy,
        "daisy",
        f"{PEER_IMPORTS}, daisy",
        1,
        "Task with a worker function and tracking_path, 2 worker processes, zarr",
    ),
}
# Not rows: run in processes of their own all the same.
OTHERS: dict[str, Callable[[Path, Case], None]] = {
    "monai-core": functools.partial(monai, core_only=True),
    "untiled": untiled,
}


# --- Measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A process group that runs a method, watched from outside."""

    command: list[str]
    folder: Path
    case: Case
    environment: dict[str, str]

    def start(self) -> None:
        self.log = (self.folder / "log.txt").open("wb")
        self.cpu = cpu_seconds()
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=self.environment,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def watch(self, until: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Until the process ends, or ``until`` says so. Raises SystemExit with its last words when it fails."""
        shards, first, peak, sampled = self.case.shards(self.folder), None, 0, 0.0
        while self.process.poll() is None and not until():
            now = time.perf_counter() - self.began
            if first is None and any(path.exists() for path in shards):
                first = now
            if now - sampled >= 0.1:
                peak, sampled = max(peak, proportional_memory(self.process.pid)), now
            time.sleep(0.02)
        seconds = time.perf_counter() - self.began
        if self.process.returncode:
            self.log.close()
            sys.exit(f"{' '.join(self.command)} failed:\n{(self.folder / 'log.txt').read_text()[-3000:]}")
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds() - self.cpu,
            "first_block_seconds": first or seconds,
            "peak_memory_bytes": peak,
        }

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def proportional_memory(pid: int) -> int:
    """Bytes of a process and its descendants, pages that several share counted once."""
    import psutil

    total = 0
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has ended meanwhile
            continue
    return total


def method_run(name: str, folder: Path, case: Case, counted: bool = False, url: str | None = None) -> Run:
    """counted: note every tile in a file; url: where ours reads its input instead."""
    command = [sys.executable, str(Path(__file__).resolve()), "--method", name, "--folder", str(folder)]
    command += ["--quick"] if case == QUICK else []
    if name == "ours" and not counted:
        command = our_command(folder, case, url)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    base = name.partition("-")[0]
    threads = METHODS[base].threads if base in METHODS else CORES
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    environment |= {READS: str(folder / "reads.txt")} | ({TICKS: str(folder / "ticks.txt")} if counted else {})
    return Run(command, folder, case, environment)


def clear(folder: Path) -> None:
    shutil.rmtree(folder / "out.zarr", ignore_errors=True)
    for name in ("ticks.txt", "reads.txt"):
        (folder / name).unlink(missing_ok=True)


def timed(name: str, folder: Path, case: Case) -> dict[str, Any]:
    """One unbroken run: time, memory, bytes read, and how far its voxels are from the untiled ones."""
    clear(folder)
    run = method_run(name, folder, case)
    run.start()
    row = run.watch()
    if name != "ours":
        row["bytes_read_over_volume"] = sum(map(int, lines(folder / "reads.txt"))) / input_bytes(folder)
    return row | differences(folder)


def differences(folder: Path) -> dict[str, Any]:
    found, meant = read_output(folder).astype(int), np.load(folder / "untiled.npy").astype(int)
    mean, uncertainty = (np.abs(found - meant)[channel] for channel in (0, 1))
    return {
        "largest_difference_mean": int(mean.max()),
        "largest_difference_uncertainty": int(uncertainty.max()),
        "voxels_that_differ": float(((mean > 0) | (uncertainty > 0)).mean()),
    }


def read_output(folder: Path) -> np.ndarray:
    from emdiffuse_vol.stores.image import open_array

    return np.asarray(open_array(str(folder / "out.zarr"), 0).read().result())


def killed(name: str, folder: Path, case: Case) -> dict[str, Any]:
    """Kill when half of the work is done, in the middle of a tile, and run again."""
    clear(folder)
    ticks, work = folder / "ticks.txt", prod(case.blocks) * MEMBERS
    run = method_run(name, folder, case, counted=True)
    run.start()
    run.watch(until=lambda: len(lines(ticks)) >= work // 2 + MEMBERS)
    run.kill()
    before = len(lines(ticks))
    run.start()
    run.watch()
    again = len(lines(ticks)) - work
    return {
        "redone": again / before,
        "work": {"all": work, "before_kill": before, "done_again": again},
        "resumed_differs_from_untiled": differences(folder)["voxels_that_differ"],
    }


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def input_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "in.zarr" / "0" / "c").rglob("*") if path.is_file())


def our_bytes(folder: Path, case: Case) -> float:
    """What our command asks of a server that holds the input."""
    sent: list[int] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def copyfile(self, source: Any, outputfile: Any) -> None:
            if "/0/c/" in self.path:
                sent.append(os.fstat(source.fileno()).st_size)
            super().copyfile(source, outputfile)

        def log_message(self, *args: Any) -> None:
            pass

    clear(folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run = method_run("ours", folder, case, url=f"http://127.0.0.1:{server.server_port}/in.zarr")
        run.start()
        run.watch()
        server.shutdown()
    return sum(sent) / input_bytes(folder)


def import_seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began


# --- The comparison --------------------------------------------------------------------------------------------------

# column -> which end is best
COLUMNS: dict[str, Callable[..., float]] = {
    "megavoxels_per_s": max,
    "peak_memory_bytes": min,
    "bytes_read_over_volume": min,
    "first_block_seconds": min,
    "redone": min,
    "largest_difference": min,
}


def compare(result: Path, case: Case) -> None:
    there = [name for name, method in METHODS.items() if importlib.util.find_spec(method.package)]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, case)
        rows = measure(there, folder, case)
    for name, method in METHODS.items():
        if name not in there:
            rows[name] = {"skipped": f"{method.package} is not installed; pip install -e '.[peers]'"}
            print(f"{name} is left out: {rows[name]['skipped']}")
    report = {
        "made_by": "benchmarks/peers.py" + (" --quick" if case == QUICK else ""),
        "versions": versions(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, no GPU",
        "data": f"phantom, {shape_text(case.sections)} voxels of {FACTOR * NM} x {NM} x {NM} nm, uint8",
        "output": f"{shape_text(case.output)} voxels, 2 channels, uint8",
        "network": f"slab, width {SIZES['width']}, deep {SIZES['deep']}, random weights, {MEMBERS} members, float32",
        "tile": case.tile,
        "tiles": prod(case.blocks),
        "methods": rows,
        "best": {column: best(column, rows) for column in COLUMNS},
    }
    result.write_text(json.dumps(rounded(report), indent=2) + "\n")
    print(table(rows))


def prepare(folder: Path, case: Case) -> None:
    """Input, weights, the grey map our survey finds, and the untiled output."""
    from emdiffuse_vol.geometry.boxes import Box
    from emdiffuse_vol.models.checkpoints import save_weights
    from emdiffuse_vol.reconstruct.greys import measure_greys
    from emdiffuse_vol.stores.image import write_array
    from emdiffuse_vol.stores.phantom import PhantomVolume

    voxel_size = (float(FACTOR * NM), float(NM), float(NM))
    volume = PhantomVolume.of(case.sections, voxel_size)
    chunk = (case.tile[0] // FACTOR, *case.tile[1:])
    sections = volume.read(Box.of(case.sections))
    write_array(folder / "in.zarr", sections, voxel_size, chunk)
    modes = ["vEMDiffuse-a"]
    save_weights(folder / "w.safetensors", random_network(), architecture="slab", config=SIZES, modes=modes)
    greys, _ = measure_greys(case.sections, lambda box: sections[box.slices()])
    (folder / "greys.json").write_text(json.dumps([greys.low, greys.high]))
    run = method_run("untiled", folder, case)
    run.start()
    run.watch()


def random_network() -> Any:
    """Random everywhere, so that no layer is hidden by zeros; the last ones small, so that greys stay in range."""
    import torch

    from emdiffuse_vol.models.slab import SlabNet

    net, generator = SlabNet(**SIZES), torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, p in net.named_parameters():
            fan = p[0].numel() if p.ndim > 1 else 100
            p.copy_(torch.randn(p.shape, generator=generator) * (0.03 if "out" in name else 1.2) / fan**0.5)
    return net.eval()


def measure(names: list[str], folder: Path, case: Case) -> dict[str, Any]:
    """Rounds go through all methods in turn, so that none has the machine's better minutes; the fastest run counts."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(case.rounds):
        for name in names:
            runs[name].append(timed(name, folder, case))
            print(name, rounded(runs[name][-1]), flush=True)
    rows: dict[str, Any] = {}
    for name in names:
        row = min(runs[name], key=lambda run: run["seconds"])
        row["all_seconds"] = [run["seconds"] for run in runs[name]]
        row["peak_memory_bytes"] = max(run["peak_memory_bytes"] for run in runs[name])
        if name == "ours":
            row["bytes_read_over_volume"] = our_bytes(folder, case)
        imports = min(import_seconds(METHODS[name].imports) for _ in range(2))
        rows[name] = {
            "how": METHODS[name].how,
            "note": NOTES[name],
            "megavoxels_per_s": prod(case.output) / 1e6 / row["seconds"],
            "imports": imports,
            "megavoxels_per_s_without_imports": prod(case.output) / 1e6 / (row["seconds"] - imports),
            **row,
            "largest_difference": max(row["largest_difference_mean"], row["largest_difference_uncertainty"]),
            **killed(name, folder, case),
        }
        print(name, rounded(rows[name]), flush=True)
    if "monai" in names:
        rows["monai"]["with_core_weights"] = timed("monai-core", folder, case)
    return rows


NOTES = {
    "ours": "fsync of every shard, ledger, survey of greys and pyramid are in its time",
    "monai": "holds the whole output in memory, as float32; nothing is on disk before the end; no resume",
    "dask": "reads every chunk once, since the graph keeps it for its neighbours; no resume: starts over",
    "daisy": "the peer nearest to ours: blocks, done markers, workers",
}
# Why ours is not the first of a column, where it is not.
WHY_NOT = {
    "megavoxels_per_s": "the network decides, and is the same; ours alone makes the pyramid, calls fsync, surveys the "
    "greys, and computes whole tiles at the far face",
    "peak_memory_bytes": "its networks run in any of four threads, and the allocator keeps what each has freed; what "
    "a peer that holds the volume needs grows with it, ours does not",
    "bytes_read_over_volume": "MONAI holds the volume, and dask the chunks its neighbours need; ours reads a sample "
    "for its grey map, which of a volume this small is all of it, and then the blocks",
    "first_block_seconds": "the survey of greys and the plan come first, and the shard is on disk, not in a cache",
    "redone": "blocks in flight are lost by every method that resumes: a difference of a tile is chance",
    "largest_difference": "one code, where a rounding falls to the other side; see voxels_that_differ",
}


def best(column: str, rows: dict[str, Any]) -> dict[str, Any]:
    found = {name: row[column] for name, row in rows.items() if column in row}
    value = COLUMNS[column](found.values())
    names = [name for name, v in found.items() if v == value]
    return {"methods": names} | ({} if "ours" in names else {"note": WHY_NOT.get(column, "not explained")})


def versions() -> dict[str, str]:
    found = {"emdiffuse_vol": importlib.metadata.version("emdiffuse_vol"), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(rows: dict[str, Any]) -> str:
    head = ["", "Mvoxel/s", "peak memory", "bytes read / volume", "first block", "redone", "largest difference"]
    out = [head, ["---"] * len(head)]
    for name, row in rows.items():
        if "skipped" not in row:
            cells = [f"{row['megavoxels_per_s']:.2f}", f"{row['peak_memory_bytes'] / 1e9:.2f} GB"]
            cells += [f"{row['bytes_read_over_volume']:.2f}", f"{row['first_block_seconds']:.1f} s"]
            cells += [f"{row['redone']:.0%}", f"{row['largest_difference']}"]
            out.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in out)


def main() -> None:
    parser = argparse.ArgumentParser(description="emdvol reconstruct beside MONAI, dask and daisy.")
    parser.add_argument("result", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a tiny volume, to see that everything runs")
    parser.add_argument("--method", choices=[*METHODS, *OTHERS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    case = QUICK if arguments.quick else FULL
    if arguments.method:
        run = METHODS[arguments.method].run if arguments.method in METHODS else OTHERS[arguments.method]
        run(arguments.folder, case)
    elif arguments.result:
        compare(arguments.result, case)
    else:
        parser.error("name the JSON file to write")


if __name__ == "__main__":
    main()
