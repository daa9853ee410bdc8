"""Neuroglancer on an output: what to serve, which state to open, and a picture of it without a screen.

Convention: the viewer is that of the Python package neuroglancer, which brings its own client: nothing is fetched from
elsewhere. Pictures are drawn by Chromium without a window, in software where there is no GPU.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emdiffuse_vol.errors import EmdvolError, InputError, OutputError
from emdiffuse_vol.geometry.boxes import Triple
from emdiffuse_vol.stores.chunked import ChunkedVolume
from emdiffuse_vol.stores.kvstore import is_remote
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.viewing.crops import Shown, choose_point
from emdiffuse_vol.viewing.scene import Made, Source, scene
from emdiffuse_vol.viewing.serving import cannot_listen, reachable

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 180.0  # seconds for a picture; software drawing on a busy core takes some ten
TITLE = 30  # pixels above a picture


@dataclass(frozen=True)
class Looked:
    """What can be looked at. folders: name -> volume on this machine, to be served; missing: why there is no input."""

    shown: Shown
    input: ChunkedVolume | None
    missing: str

    @property
    def folders(self) -> dict[str, Path]:
        found = {self.shown.path.name: self.shown.path}
        if self.input is not None and not is_remote(self.input.url):
            found[self.input_name] = Path(self.input.url)
        return found

    @property
    def input_name(self) -> str:
        """In the address; another than the output's."""
        assert self.input is not None
        name = self.input.url.rsplit("/", 1)[-1]
        return f"input-{name}" if name == self.shown.path.name else name

    def state(self, urls: Mapping[str, str], at: Triple | None, threshold: float) -> dict[str, Any]:
        """urls: of ``folders``, as a browser fetches them."""
        before = None
        if self.input is not None:
            url = self.input.url if is_remote(self.input.url) else urls[self.input_name]
            before = _source(self.input, url)
        return scene(_made(self.shown, urls[self.shown.path.name]), before, choose_point(self.shown, at), threshold)


def look(path: Path, input: str | None) -> Looked:
    """An output and its input, which is where the run has read it if not given. Raises OutputError where there is no
    output, InputError where the input that was asked for is none that a browser can read."""
    shown = Shown(path)
    job = shown.job
    level = job.input_options.get("level")
    z, y, x = job.input_identity["voxel_size"]  # as the run has understood it
    try:
        channel = job.input_options.get("channel")
        volume = open_volume(input or job.input, channel=channel, voxel_size=None if level else (z, y, x))
        if not isinstance(volume, ChunkedVolume) or not str(volume.spec.identity["format"]).startswith("OME-Zarr"):
            raise InputError(
                f"{volume.url} is no OME-Zarr, which viewers can place; make one of it with emdvol convert"
            )
    except EmdvolError as error:
        if input is not None:
            raise
        return Looked(shown, None, f"the input is not shown: {error}")
    return Looked(shown, volume, "")


def _source(volume: ChunkedVolume, url: str) -> Source:
    return Source(url, volume.spec.voxel_size, volume.spec.origin, volume.axes, volume.region)


def _made(shown: Shown, url: str) -> Made:
    mean = shown.mean_volume
    assert isinstance(mean, ChunkedVolume)
    low, high = shown.job.greys
    more = (high - low) / 2
    window = (0.0, 255.0) if mean.spec.dtype == "uint8" else (low - more, high + more)
    # Both channels are for the shaders, not one of them for the volume.
    source = replace(_source(mean, url), fixed=(None,) * len(mean.axes))
    uncertainty = shown.made["uncertainty"]
    return Made(
        source,
        shown.shape,
        (low, high),
        window,
        float(uncertainty["step"]),
        shown.unit,
        int(uncertainty["channel"]),
    )


@contextmanager
def viewing(state: dict[str, Any], host: str, port: int) -> Iterator[Any]:
    """A viewer of the package neuroglancer that has this state. Raises OutputError where the package is missing or the
    port is taken."""
    try:
        import neuroglancer
    except ImportError as error:
        raise OutputError(
            "emdvol view needs neuroglancer; install it with: pip install 'emdiffuse_vol[view]'"
        ) from error
    neuroglancer.set_server_bind_address(bind_address=host, bind_port=port)
    try:
        viewer = neuroglancer.Viewer()
    except OSError as error:
        raise OutputError(cannot_listen(host, port, error)) from error
    try:
        viewer.set_state(state)
        yield viewer
    finally:
        neuroglancer.stop()


def viewer_url(viewer: Any, host: str) -> str:
    """The package would name the host that it listens on."""
    import neuroglancer.server

    server = neuroglancer.server.global_server
    return f"http://{reachable(host)}:{server.port}/v/{viewer.token}/"


def find_chromium() -> str | None:
    return next((found for name in CHROMIUM if (found := shutil.which(name))), None)


def screenshot(viewer: Any, url: str, path: Path, size: tuple[int, int] = (1440, 960)) -> None:
    """Write a PNG of what the viewer shows once all is loaded, with a title above each column. Raises OutputError."""
    from PIL import Image

    browser = find_chromium()
    if browser is None:
        raise OutputError(f"a picture needs Chromium, found none of {', '.join(CHROMIUM)}; install one (apt: chromium)")
    with viewer.txn() as state:  # voxels alone
        state.show_axis_lines = False
        state.selected_layer.visible = False
    with chromium(browser, url, size):
        drawn = _drawn(viewer, size)
    image = titled(Image.open(io.BytesIO(drawn)).convert("RGB"), [layer.name for layer in viewer.state.layers])
    try:
        image.save(path, "PNG", optimize=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def _drawn(viewer: Any, size: tuple[int, int]) -> bytes:
    """The package waits without end, so it does in a thread of its own."""
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(viewer.screenshot(size=size).screenshot.image), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not found:
        raise OutputError(
            f"Chromium has drawn nothing within {PATIENCE:.0f} s; look with a browser, without --screenshot"
        )
    return found[0]


@contextmanager
def chromium(browser: str, url: str, size: tuple[int, int]) -> Iterator[None]:
    """Chromium without a window on a page, and its processes, while the context lasts."""
    options = ["--headless", "--enable-unsafe-swiftshader", "--hide-scrollbars", "--no-first-run", "--mute-audio"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--no-sandbox")  # Chromium refuses its sandbox to root
    with tempfile.TemporaryDirectory(prefix="emdvol-chromium-", ignore_cleanup_errors=True) as profile:
        options += [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        process = subprocess.Popen(
            [browser, *options, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def titled(image: Any, titles: list[str]) -> Any:
    """A strip above columns of equal width with a title for each."""
    from PIL import Image, ImageDraw, ImageFont

    page = Image.new("RGB", (image.width, image.height + TITLE), "white")
    page.paste(image, (0, TITLE))
    draw = ImageDraw.Draw(page)
    for i, title in enumerate(titles):
        left = round(i * image.width / len(titles))
        draw.text((left + 10, TITLE / 2), title, fill="#1f2933", font=ImageFont.load_default(17), anchor="lm")
    return page
