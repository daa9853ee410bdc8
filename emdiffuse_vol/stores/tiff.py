"""Reading TIFF: one file with a section per page, or a folder with a section per file.

Convention: sections are z, in page order or in natural order of the file names (numbers as numbers: section_2 before
section_10). All have one shape and dtype. Where a file has a channel axis, ``channel`` says which to take. Files are
read alone: other files that OME-XML names are not opened. Only the sections, and of compressed ones only the strips or
tiles, that a box needs are read; nothing stays open between reads. The voxel size counts only where the file gives all
three.
"""

from __future__ import annotations

import logging
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from emdiffuse_vol.errors import InputError
from emdiffuse_vol.geometry.boxes import Box, Triple, ceil_div
from emdiffuse_vol.stores.spec import digest_of, make_spec
from emdiffuse_vol.stores.units import nanometres
from emdiffuse_vol.stores.volume import Nanometres, VolumeSpec

# Without a handler Python would print tifffile's warnings on a damaged file beside the one line that we say of it.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# What tifffile and the decoders raise on files that are cut short, damaged, or beyond them.
UNREADABLE = (
    *(tifffile.TiffFileError, OSError, ValueError, TypeError, LookupError, RuntimeError),
    *(ArithmeticError, AttributeError, AssertionError, EOFError, struct.error, zlib.error, ElementTree.ParseError),
)

# A strip or tile is decoded whole. One that is both larger than this many bytes and this many times what is stored of
# it is not there: the codecs that can do more do so for one grey only.
LARGEST_SEGMENT, LARGEST_RATIO = 1 << 30, 2000


@dataclass(frozen=True)
class Section:
    """Where one section is stored. offset: of its first byte where the greys lie in one piece, else None."""

    file: Path
    page: int
    offset: int | None
    shape: tuple[int, int]
    dtype: np.dtype[Any]


@dataclass(eq=False)
class TiffVolume:
    url: str
    options: dict[str, Any]
    spec: VolumeSpec
    sections: tuple[Section, ...] = field(repr=False)

    def read(self, box: Box) -> NDArray[Any]:
        assert box in Box.of(self.spec.shape), f"box {box} is not inside shape {self.spec.shape}"
        z, y, x = box.slices()
        out = np.empty(box.shape, self.spec.dtype)
        planes = iter(out)
        for file, sections in groupby(self.sections[z], key=lambda section: section.file):
            try:
                _read_sections(file, list(sections), y, x, planes)
            except UNREADABLE as error:
                raise InputError(f"{file} is damaged: {_line(error)}; copy it again from its source") from error
        return out


def _read_sections(file: Path, sections: list[Section], y: slice, x: slice, planes: Iterator[NDArray[Any]]) -> None:
    compressed = [section.page for section in sections if section.offset is None]
    if not compressed:
        for section in sections:
            # Mapped anew for every read: ten thousand open files would pass the limit of the system.
            greys = np.memmap(file, section.dtype, "r", section.offset or 0, section.shape)
            next(planes)[:] = greys[y, x]
        return
    with _opened(file) as tif:
        for page in compressed:
            _decode(tif.pages[page].aspage(), y, x, next(planes))


def _decode(page: tifffile.TiffPage, y: slice, x: slice, out: NDArray[Any]) -> None:
    """Decode the strips or tiles of a page that meet a window, into ``out``."""
    rows, cols = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    rows = min(rows, page.imagelength)
    across = ceil_div(page.imagewidth, cols)
    for row in range(y.start // rows, ceil_div(y.stop, rows)):
        for col in range(x.start // cols, ceil_div(x.stop, cols)):
            index = row * across + col
            handle = page.parent.filehandle
            handle.seek(page.dataoffsets[index])
            data = handle.read(page.databytecounts[index])
            segment = page.decode(data, index, jpegtables=page.jpegtables)[0]
            if segment is None:
                raise ValueError(f"page {page.index} lacks strip or tile {index}")
            top, left = row * rows, col * cols
            part = Box((0, y.start, x.start), (1, y.stop, x.stop)) & Box(
                (0, top, left), (1, min(top + rows, page.imagelength), min(left + cols, page.imagewidth))
            )
            out[part.slices((0, y.start, x.start))[1:]] = segment[0, ..., 0][part.slices((0, top, left))[1:]]


def is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in MAGIC


def section_files(folder: Path) -> list[Path]:
    """TIFF files of a folder in natural order; hidden ones (macOS leaves ``._name.tif``) do not count."""
    files = (f for f in folder.iterdir() if f.suffix.lower() in (".tif", ".tiff") and not f.name.startswith("."))
    return sorted(files, key=lambda f: (natural(f.name), f.name))


def natural(name: str) -> list[str | int]:
    """Sort key: digits count as numbers. Text and numbers alternate, so that keys can always be compared."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def open_tiff(path: Path, *, voxel_size: Nanometres | None = None, channel: int | str | None = None) -> TiffVolume:
    """A file, or a folder with TIFF files in it. Raises InputError naming the file that is wrong."""
    files = section_files(path) if path.is_dir() else [path]
    sections: list[Section] = []
    for file in files:
        try:
            found = _scan(file, channel)
        except UNREADABLE as error:
            raise InputError(f"{file} cannot be read as TIFF: {_line(error)}; copy it again") from error
        if len(files) > 1 and len(found) > 1:
            raise InputError(f"{file} holds {len(found)} sections, expected one per file; give the file itself")
        sections += found
    first = sections[0]
    for section in sections:
        _check_equal(section, first, paged=len(files) == 1)
    try:
        stored = voxel_size or stored_voxel_size(files[0])
    except UNREADABLE as error:
        raise InputError(f"{files[0]} has metadata that make no sense: {_line(error)}; give --voxel-size") from error
    chunk: Triple | None = (1, *first.shape)
    spec = make_spec(
        path.name,
        shape=(len(sections), *first.shape),
        dtype=first.dtype.name,
        voxel_size=stored,
        chunk=chunk,
        format="TIFF",
        digest=digest_of([[f.name, f.stat().st_size] for f in files] + ([] if channel is None else [["c", channel]])),
    )
    return TiffVolume(str(path), {"voxel_size": voxel_size, "channel": channel}, spec, tuple(sections))


def _scan(file: Path, channel: int | str | None) -> list[Section]:
    size = file.stat().st_size
    with _opened(file) as tif:
        pages = [page.aspage() for page in tif.pages]
        if not pages:
            raise ValueError("it has no pages")
        for page in pages:
            if page.samplesperpixel != 1 or page.imagedepth != 1:
                raise InputError(f"{file} holds colours or depth in page {page.index}, expected grey sections")
        sections = [_section(file, page) for page in pages]
        if _next_page(tif, pages[-1]):
            raise ValueError(f"its pages end at page {len(pages)}, though it says that more follow")
    with _opened(file) as tif:
        series = tif.series[0]
        axes = {a: n for a, n in zip(series.axes, series.shape, strict=True) if a not in "YX" and n > 1}
        count = prod(axes.values())
        stored = [page.index for page in series.pages if page is not None]
        if len(sections) == 1 and count > 1 and series.dataoffset is not None:
            # ImageJ describes a large stack by its first page only; the others follow it without a gap.
            step = pages[0].nbytes
            if series.dataoffset + count * step > size:
                raise ValueError(f"it ends after {size} bytes, expected {series.dataoffset + count * step}")
            first = sections[0]
            sections = [_moved(first, index, series.dataoffset + index * step) for index in range(count)]
        elif (said := int((tif.imagej_metadata or {}).get("images", 1))) > len(sections):
            raise ValueError(f"it has {len(sections)} sections, though it says {said}")
        elif sorted(stored) == list(range(len(sections))):
            sections = [sections[index] for index in stored]  # OME-XML may tell another order than the pages have
    for section in sections:
        end = 0 if section.offset is None else section.offset + section.dtype.itemsize * prod(section.shape)
        if end > size:
            raise ValueError(f"it ends after {size} bytes, expected {end}")
    return _of_channel(file, sections, axes, channel)


def _next_page(tif: tifffile.TiffFile, page: tifffile.TiffPage) -> int:
    """Where the page after this one is said to be, 0 for none: tifffile ends in silence where a file is cut short."""
    layout, handle = tif.tiff, tif.filehandle
    handle.seek(page.offset)
    (tags,) = struct.unpack(layout.tagnoformat, handle.read(layout.tagnosize))
    handle.seek(page.offset + layout.tagnosize + tags * layout.tagsize)
    (found,) = struct.unpack(layout.offsetformat, handle.read(layout.offsetsize))
    return int(found)


def _of_channel(file: Path, sections: list[Section], axes: dict[str, int], channel: int | str | None) -> list[Section]:
    """axes: of all sections in their order, y and x and those of size 1 left out."""
    if len(axes) - ("C" in axes) > 1:
        raise InputError(f"{file} has axes {axes} besides y and x, expected z and at most channels; extract one volume")
    if "C" not in axes or len(sections) != prod(axes.values()):
        if channel not in (None, 0):
            raise InputError(f"{file} has one channel, found channel {channel}; leave --channel out")
        return sections
    if not isinstance(channel, int) or not 0 <= channel < axes["C"]:
        raise InputError(f"{file} has {axes['C']} channels, expected z, y, x; choose one with --channel, from 0")
    order = np.arange(len(sections)).reshape(tuple(axes.values()))
    return [sections[int(i)] for i in order.take(channel, axis=list(axes).index("C")).ravel()]


def _opened(file: Path) -> tifffile.TiffFile:
    # Names of files inside OME-XML could lead anywhere.
    return tifffile.TiffFile(file, _multifile=False)


def _section(file: Path, page: tifffile.TiffPage) -> Section:
    if page.dtype is None:
        raise ValueError(f"page {page.index} has greys of an unknown kind")
    dtype = page.dtype.newbyteorder(page.parent.byteorder)
    offset = page.dataoffsets[0] if page.is_final else None
    segment = prod(page.chunks) * dtype.itemsize
    if offset is None and segment > max(LARGEST_SEGMENT, LARGEST_RATIO * max(page.databytecounts, default=0)):
        raise ValueError(f"page {page.index} says it has strips or tiles of {segment / 2**30:.3g} GiB")
    return Section(file, page.index, offset, (page.imagelength, page.imagewidth), dtype)


def _moved(section: Section, page: int, offset: int) -> Section:
    return Section(section.file, page, offset, section.shape, section.dtype)


def _check_equal(section: Section, first: Section, paged: bool) -> None:
    if (section.shape, section.dtype.name) != (first.shape, first.dtype.name):
        which = f"page {section.page} of {section.file}" if paged else str(section.file)
        raise InputError(
            f"{which} is {section.dtype.name} {section.shape}, expected {first.dtype.name} {first.shape} "
            "as in the first section; make all sections alike"
        )


def stored_voxel_size(file: Path) -> Nanometres | None:
    """nm z y x from OME-XML or from ImageJ's tags; None unless all three are there with a unit of length."""
    with _opened(file) as tif:
        if tif.ome_metadata:
            return _ome_voxel_size(tif.ome_metadata)
        ij, tags = tif.imagej_metadata or {}, tif.pages.first.tags
        unit = nanometres(str(ij.get("unit", "")))
        ratios = [tags[key].value for key in ("YResolution", "XResolution") if key in tags]
    if unit is None or "spacing" not in ij or len(ratios) != 2 or not all(n for n, _ in ratios):
        return None
    y, x = (unit * below / pixels for pixels, below in ratios)  # the tag counts pixels in a unit
    return unit * float(ij["spacing"]), y, x


def _ome_voxel_size(xml: str) -> Nanometres | None:
    pixels = next((e for e in ElementTree.fromstring(xml).iter() if e.tag.endswith("}Pixels")), None)
    if pixels is None:
        return None
    sizes = []
    for axis in "ZYX":
        value, unit = pixels.get(f"PhysicalSize{axis}"), nanometres(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        if value is None or unit is None:
            return None
        sizes.append(float(value) * unit)
    return sizes[0], sizes[1], sizes[2]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
