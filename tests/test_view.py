"""`emdvol view`: volumes over HTTP and nothing else, a state that puts all in one space, and a picture of it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from volumes import run, small_request

from emdiffuse_vol.cli.main import main
from emdiffuse_vol.errors import OutputError
from emdiffuse_vol.viewing import viewer
from emdiffuse_vol.viewing.serving import Address, byte_range, serving
from emdiffuse_vol.viewing.viewer import look

DATA = bytes(range(256)) * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(small_request(folder))
    return folder


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Address]:
    """A volume "a b.zarr" with a chunk, beside a file that is nobody's business."""
    volume = tmp_path / "a b.zarr"
    (volume / "0" / "c").mkdir(parents=True)
    (volume / "0" / "c" / "1").write_bytes(DATA)
    (volume / "zarr.json").write_text("{}")
    (tmp_path / "secret.txt").write_text("secret")
    (volume / "out").symlink_to(tmp_path / "secret.txt")
    (volume / "up").symlink_to(tmp_path)
    (volume / "inside").symlink_to(volume / "zarr.json")
    with serving({"a b.zarr": volume}) as address:
        yield address


def ask(address: Address, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """``path`` goes out as it is: clients would tidy up dots."""
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def at(address: Address, key: str) -> str:
    return urlsplit(address.url("a b.zarr")).path + key


def test_whole_files_and_heads(served: Address) -> None:
    status, headers, body = ask(served, at(served, "0/c/1"))
    assert (status, body) == (200, DATA) and headers["Content-Length"] == str(len(DATA))
    assert headers["Access-Control-Allow-Origin"] == "*" and headers["Accept-Ranges"] == "bytes"
    status, headers, body = ask(served, at(served, "0/c/1"), "HEAD")
    assert (status, body) == (200, b"") and headers["Content-Length"] == str(len(DATA))
    assert ask(served, at(served, "zarr.json"))[1]["Content-Type"] == "application/json"
    assert ask(served, at(served, "inside"))[2] == b"{}"


@pytest.mark.parametrize(
    ("asked", "part"),
    [("bytes=0-0", DATA[:1]), ("bytes=10-19", DATA[10:20]), ("bytes=2300-", DATA[2300:]), ("bytes=-20", DATA[-20:]),
     ("bytes=2300-99999", DATA[2300:]), ("bytes=-99999", DATA)],
)  # fmt: skip
def test_ranges(served: Address, asked: str, part: bytes) -> None:
    status, headers, body = ask(served, at(served, "0/c/1"), Range=asked)
    assert (status, body) == (206, part)
    first = DATA.rindex(part) if asked.endswith("-") else len(DATA) - len(part) if asked[6] == "-" else None
    if first is not None:
        assert headers["Content-Range"] == f"bytes {first}-{first + len(part) - 1}/{len(DATA)}"


@pytest.mark.parametrize("asked", ["bytes=9999-", "bytes=5-4", "bytes=0-1,3-4", "bytes=-", "bytes=-0", "lines=1-2"])
def test_ranges_that_are_not_there(served: Address, asked: str) -> None:
    status, headers, body = ask(served, at(served, "0/c/1"), Range=asked)
    assert (status, body) == (416, b"") and headers["Content-Range"] == f"bytes */{len(DATA)}"


def test_byte_range_of_an_empty_file_is_none() -> None:
    assert byte_range("bytes=0-", 0) is None and byte_range("bytes=-5", 0) is None


def test_browsers_may_ask_before_they_fetch(served: Address) -> None:
    status, headers, _ = ask(served, at(served, "0/c/1"), "OPTIONS", Origin="https://example.org")
    assert status == 204 and headers["Access-Control-Allow-Headers"] == "Range"


@pytest.mark.parametrize(
    "key",
    [
        "../secret.txt",
        "%2e%2e/secret.txt",
        "0/../../secret.txt",
        "..%2fsecret.txt",
        "0/%2e%2e%2f%2e%2e%2fsecret.txt",
        "out",
        "up/secret.txt",
        "/etc/passwd",
        "%2fetc/passwd",
        "",
        "0",
        "0/c/",
        "zarr.json/",
        "none",
        "zarr.json%00",
        "./zarr.json",
    ],
)
def test_nothing_but_files_of_the_volume(served: Address, key: str) -> None:
    status, headers, body = ask(served, at(served, key))
    assert (status, body) == (404, b"") and headers["Access-Control-Allow-Origin"] == "*"


def test_nothing_without_the_secret_and_nothing_is_written(served: Address) -> None:
    for path in ("/", "/a%20b.zarr/zarr.json", "/wrong/a%20b.zarr/zarr.json", "//a%20b.zarr/zarr.json", "zarr.json"):
        assert ask(served, path)[0] == 404
    assert ask(served, at(served, "zarr.json").replace("a%20b.zarr", "other"))[0] == 404
    for method in ("PUT", "POST", "DELETE"):
        assert ask(served, at(served, "zarr.json"), method)[0] == 501


def test_connections_are_kept_and_answers_do_not_mix(served: Address) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    for key, expected in [("0/c/1", DATA), ("none", b""), ("zarr.json", b"{}")] * 3:
        connection.request("GET", at(served, key))
        assert connection.getresponse().read() == expected
    connection.close()


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OutputError, match=f"port {port} of 127.0.0.1 is taken"), serving({}, port=port):
            pass


def state_of(folder: Path, **settings: object) -> dict:
    looked = look(folder / "out.zarr", None)
    urls = {name: f"https://example.org/{name}/" for name in looked.folders}
    return looked.state(urls, settings.get("at"), 0.12)  # type: ignore[arg-type]


def test_state_has_three_layers_side_by_side_in_one_space(folder: Path) -> None:
    state = state_of(folder, at=(33, 20, 71))
    assert [layer["name"] for layer in state["layers"]] == ["input", "reconstruction", "uncertainty"]
    for row, layout in zip(state["layout"]["children"], ("xy", "xz"), strict=True):
        assert [(panel["layers"], panel["layout"]) for panel in row["children"]] == [
            (["input"], layout),
            (["reconstruction"], layout),
            (["uncertainty"], layout),
        ]
    assert state["position"] == [71, 20, 33]
    assert {a: round(s * 1e9, 6) for a, (s, _) in state["dimensions"].items()} == {"x": 10, "y": 10, "z": 10}
    greys = json.loads((folder / "out.zarr" / "zarr.json").read_text())["attributes"]["emdvol"]["greys"]
    for layer in state["layers"][:2]:
        assert f"range=[{greys['low']:g}, {greys['high']:g}]" in layer["shader"]


def test_both_channels_are_for_shaders(folder: Path) -> None:
    _, mean, uncertainty = state_of(folder)["layers"]
    for layer in (mean, uncertainty):
        assert list(layer["source"]["transform"]["outputDimensions"]) == ["c^", "z", "y", "x"]
    assert "getDataValue(0)" in mean["shader"] and "getDataValue(1)" in uncertainty["shader"]
    assert "#uicontrol float threshold slider(" in uncertainty["shader"] and "default=0.12" in uncertainty["shader"]
    assert f"* {1 / 8 / 255:.8g};" in uncertainty["shader"]


def test_position_counts_from_the_origin_of_the_space(tmp_path: Path) -> None:
    """A region begins elsewhere: at plane 20, row 10 and column 30 of the whole output."""
    run(small_request(tmp_path, roi="4:12,10:60,30:100"))
    state = state_of(tmp_path, at=(3, 17, 8))
    assert state["position"] == pytest.approx([38, 27, 23])
    sections, mean, _ = (layer["source"]["transform"]["outputDimensions"] for layer in state["layers"])
    assert {axis: round(size * 1e9, 6) for axis, (size, _) in sections.items()} == {"z": 50, "y": 10, "x": 10}
    assert {axis: round(size * 1e9, 6) for axis, (size, unit) in mean.items() if unit} == {"z": 10, "y": 10, "x": 10}


def test_input_that_cannot_be_shown_is_said(folder: Path, tmp_path: Path) -> None:
    import tifffile

    tifffile.imwrite(tmp_path / "in.tif", np.zeros((3, 20, 20), np.uint8), photometric="minisblack")
    result = view(folder / "out.zarr", "--with", tmp_path / "in.tif", "--link", "https://example.org")
    assert result.exit_code == 1 and "emdvol convert" in " ".join(result.output.split())
    (tmp_path / "b").mkdir()
    run(small_request(tmp_path / "b"))
    (tmp_path / "b" / "in.zarr").rename(tmp_path / "gone.zarr")
    looked = look(tmp_path / "b" / "out.zarr", None)
    assert looked.input is None and "the input is not shown" in looked.missing
    state = looked.state({"out.zarr": "https://example.org/out.zarr/"}, None, 0.12)
    assert [layer["name"] for layer in state["layers"]] == ["reconstruction", "uncertainty"]


def view(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["view", *map(str, arguments)])


def test_link_holds_the_state(folder: Path) -> None:
    result = view(folder / "out.zarr", "--link", "https://example.org/bucket/")
    assert result.exit_code == 0, result.output
    url, fragment = result.output.strip().split("#!")
    state = json.loads(unquote(fragment))
    assert url.startswith("https://neuroglancer") and not re.search(r"\s", fragment)
    assert [layer["source"]["url"] for layer in state["layers"]] == [
        f"zarr://https://example.org/bucket/{name}/" for name in ("in.zarr", "out.zarr", "out.zarr")
    ]
    assert view(folder / "out.zarr", "--link", "/a/folder").exit_code == 2


def test_missing_neuroglancer_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neuroglancer", None)
    result = view(folder / "out.zarr", "--no-open")
    assert result.exit_code == 1 and "pip install 'emdiffuse_vol[view]'" in " ".join(result.output.split())


def test_missing_chromium_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("neuroglancer")
    monkeypatch.setattr(viewer, "CHROMIUM", ("no-such-browser",))
    result = view(folder / "out.zarr", "--screenshot", tmp_path / "a.png")
    assert result.exit_code == 1 and "needs Chromium" in result.output
    assert not (tmp_path / "a.png").exists()


@pytest.mark.slow
def test_neuroglancer_shows_em_in_all_panels(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("neuroglancer")
    if viewer.find_chromium() is None:
        pytest.skip("Chromium is not here: apt-get install chromium")
    picture = tmp_path / "view.png"
    command = [sys.executable, "-m", "emdiffuse_vol", "view", folder / "out.zarr", "--at", "32,30,50"]
    subprocess.run([*command, "--screenshot", picture], check=True, timeout=250)
    page = np.asarray(Image.open(picture).convert("RGB")).astype(int)[viewer.TITLE :]
    assert page.shape[:2] == (960, 1440)
    middle = [page[row : row + 100, 480 * i + 180 : 480 * i + 300] for row in (190, 680) for i in range(3)]
    contrast = [panel.std(axis=(0, 1)).max() for panel in middle]
    assert min(contrast) > 8, contrast
    grey = [np.ptp(panel, axis=2).max() < 3 for panel in middle]
    assert grey == [True, True, False] * 2


@pytest.mark.slow
def test_neuroglancer_shows_input_and_reconstruction_at_one_place(tmp_path: Path) -> None:
    """On a section, in a region: the reconstruction is the input there, and its uncertainty is 0 one plane thick."""
    pytest.importorskip("neuroglancer")
    if viewer.find_chromium() is None:
        pytest.skip("Chromium is not here: apt-get install chromium")
    run(small_request(tmp_path, roi="4:12,0:60,10:100"))
    picture = tmp_path / "view.png"
    command = [sys.executable, "-m", "emdiffuse_vol", "view", tmp_path / "out.zarr", "--at", "10,30,40"]
    subprocess.run([*command, "--screenshot", picture], check=True, timeout=250)
    page = np.asarray(Image.open(picture).convert("RGB")).astype(int)[viewer.TITLE :]
    column = (page.shape[1] + 8) / 3  # panels are 8 pixels apart
    rows, columns = slice(190, 290), np.arange(160, 320)
    left, middle, right = (page[rows, columns + round(i * column)] for i in range(3))
    assert np.corrcoef(left[..., 0].ravel(), middle[..., 0].ravel())[0, 1] > 0.95
    assert right.max() < 12
    assert page[600:800, round(2 * column) :].max() > 60
