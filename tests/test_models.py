"""`emdvol models`: weights get a name, are what their checksum says, and are refused in one line where they are not."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import random_slab
from test_checkpoints import published_state
from test_cli import emdvol, refused
from torch import Tensor
from volumes import smooth_volume, write_volume, write_weights

from emdiffuse_vol.errors import WeightsError
from emdiffuse_vol.models import symmetry
from emdiffuse_vol.models.checkpoints import EMBEDDED, MODELS, PUBLISHED_BUFFERS, embedded, load_weights, save_weights
from emdiffuse_vol.models.download import file_name, public
from emdiffuse_vol.models.symmetry import compare


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of weights."""
    folder = tmp_path / "models"
    monkeypatch.setenv("EMDVOL_MODELS", str(folder))
    return folder


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "ours.safetensors")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PREFIX of a raw and an EMA file, told apart by their values; the shapes are the published ones."""
    folder = tmp_path_factory.mktemp("published")
    state = published_state("unet-vem")
    torch.save(state, folder / "best_Network.pth")
    ema = {key: value + 1 for key, value in state.items() if key not in PUBLISHED_BUFFERS}
    torch.save(ema, folder / "best_Network_ema.pth")
    return folder / "best"


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; what is asked for below /cut/ ends half way, and below /slow/ it stops there for long."""

    seen: list[str]
    halfway: threading.Event
    go_on: threading.Event

    def do_GET(self) -> None:
        self.seen.append(self.path)
        if not self.path.startswith(("/cut/", "/slow/")):
            return super().do_GET()
        content = (Path(self.directory) / self.path.split("/")[2].partition("?")[0]).read_bytes()
        self.send_response(200)
        if "silent" not in self.path:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        if self.path.startswith("/slow/"):
            self.halfway.set()
            self.go_on.wait(60)

    def log_message(self, *said: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """-> http://127.0.0.1:PORT, which serves tmp_path"""
    Handler.seen, Handler.halfway, Handler.go_on = [], threading.Event(), threading.Event()

    def handler(*arguments: Any) -> Handler:
        return Handler(*arguments, directory=str(tmp_path))

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        Handler.go_on.set()
        http.shutdown()
        thread.join()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_in(folder: Path) -> list[str]:
    """Files; a folder that a download was to go to may be there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def shown(*arguments: object) -> Any:
    status, output = emdvol("models", *arguments, "--json")
    assert status == 0, output
    return json.loads(output)


# Names


def test_list_shows_the_embedded_and_the_imported(ours: Path) -> None:
    assert emdvol("models", "import", ours, "--as", "mine")[0] == 0
    found = {weights["name"]: weights for weights in shown("list")}
    assert found[EMBEDDED]["origin"] == "embedded" and found[EMBEDDED]["calibrated"]
    mine = found["mine"]
    assert (mine["gaps"], mine["factor"], mine["calibrated"]) == ([1.1, 20], None, False)
    assert mine["modes"] == ["vEMDiffuse-i", "vEMDiffuse-a"]
    assert mine["parameters"] == sum(p.numel() for p in load_weights("mine").net.parameters())
    assert mine["bytes"] == Path(mine["path"]).stat().st_size
    status, table = emdvol("models", "list")
    assert status == 0 and f"{mine['parameters']:,}" in table
    assert "1.1 to 20 px" in table and "imported from ours.safetensors" in table


def test_list_needs_no_torch_and_survives_a_damaged_file(models: Path) -> None:
    models.mkdir()
    (models / "broken.safetensors").write_bytes(b"no tensors here")
    code = (
        "import sys; from emdiffuse_vol.cli.main import main\n"
        "try: main(['models', 'list'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    table = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "broken" in table and "cannot be read" in table and EMBEDDED in table
    refused("models", "show", "broken", says="damaged or no safetensors file")


def test_show_says_all_and_ends_with_the_card() -> None:
    facts = shown("show", EMBEDDED)
    weights = load_weights()
    assert facts["sha256"] == weights.sha256 and facts["architecture"] == weights.architecture
    assert facts["calibration"] == weights.metadata["calibration"]
    assert "CC-BY" in facts["licence"] and facts["card"].startswith(f"# {EMBEDDED}")
    status, text = emdvol("models", "show", EMBEDDED)
    assert status == 0
    for word in (weights.sha256, "percentiles", "coverage of the 90 % interval", "licence", f"# {EMBEDDED}"):
        assert word in text


def test_show_takes_a_path_and_says_what_it_does_not_know(published: Path) -> None:
    status, text = emdvol("models", "show", f"{published}_Network.pth")
    assert status == 0
    assert "any (not known)" in text and "not known" in text and "16,615,873" in text
    refused("models", "show", "nothing", says="no weights nothing; give a file, a URL with its checksum, or a name")


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "", "x.pth", "a b", "x.safetensors"])
def test_names_are_plain(ours: Path, models: Path, name: str) -> None:
    refused("models", "import", ours, "--as", name, says="is no name for weights")
    assert not models.exists()


def test_names_that_are_taken_are_kept(ours: Path, models: Path, tmp_path: Path) -> None:
    refused("models", "import", ours, "--as", EMBEDDED, says="come with the package")
    assert emdvol("models", "import", ours, "--as", "mine")[0] == 0
    before = sha256(models / "mine.safetensors")
    other = tmp_path / "other.safetensors"
    save_weights(other, random_slab(4, 8), architecture="slab", config={"width": 4, "deep": 8}, modes=["vEMDiffuse-i"])
    refused("models", "import", other, "--as", "mine", says="add --overwrite")
    assert sha256(models / "mine.safetensors") == before
    assert emdvol("models", "import", other, "--as", "mine", "--overwrite")[0] == 0
    assert load_weights("mine").config == {"width": 4, "deep": 8}


# Importing


def test_imported_weights_are_the_same_network_and_say_where_from(ours: Path, models: Path) -> None:
    ours.with_suffix(".md").write_text("# A card")
    status, output = emdvol("models", "import", ours, "--as", "mine", "--mode", "vEMDiffuse-a")
    assert status == 0 and sha256(ours) in output and "not verified" in output
    mine, source = load_weights("mine"), load_weights(str(ours))
    assert mine.metadata["modes"] == ["vEMDiffuse-a"] and mine.metadata["gaps"] == [1.1, 20]
    assert mine.metadata["origin"] == {"file": "ours.safetensors", "sha256": sha256(ours)}
    state = mine.net.state_dict()
    assert all(torch.equal(state[key], value) for key, value in source.net.state_dict().items())
    assert shown("show", "mine")["card"] == "# A card"
    assert left_in(models) == ["mine.md", "mine.safetensors"]
    refused(
        "models", "import", ours, "--as", "m", "--mode", "EMDiffuse-r", says="serve vEMDiffuse-i, vEMDiffuse-a, not"
    )
    refused("models", "import", ours, "--as", "m", "--factor", 6, says="--factor is of published vEMDiffuse weights")
    refused(
        "models", "import", ours, "--as", "m", "--sha256", "0" * 64, says=f"have SHA-256 {sha256(ours)}, expected 0"
    )
    refused("models", "import", ours, "--as", "m", "--sha256", "12", says="is no SHA-256")
    refused("models", "import", ours, "--as", "m", "--ema", says="leave it out")


@pytest.mark.parametrize(("ema", "kind"), [((), "raw"), (("--ema",), "EMA")])
def test_a_published_prefix_means_the_raw_or_the_ema_weights(published: Path, ema: tuple[str], kind: str) -> None:
    status, output = emdvol("models", "import", published, "--as", "liver", "--factor", 6, *ema)
    assert status == 0, output
    file = Path(f"{published}_Network{'_ema' if ema else ''}.pth")
    assert sha256(file) in output
    weights = load_weights("liver")
    assert (weights.architecture, weights.metadata["factor"], weights.metadata["greys"]) == ("unet-vem", 6, "dtype")
    assert weights.metadata["origin"] == {"file": file.name, "sha256": sha256(file), "kind": kind}
    expected = torch.load(file, weights_only=True)
    assert all(torch.equal(value, expected[f"denoise_fn.{key}"]) for key, value in weights.net.state_dict().items())
    assert f"imported from {file.name} ({kind})" in emdvol("models", "list")[1]


def test_what_is_no_source_is_refused(published: Path, tmp_path: Path, models: Path) -> None:
    refused("models", "import", tmp_path / "best", "--as", "m", says="best_Network.pth; give a .safetensors")
    refused("models", "import", "best.zip", "--as", "m", says="is an archive; unpack it")
    (tmp_path / "net.onnx").touch()
    refused("models", "import", tmp_path / "net.onnx", "--as", "m", says="neither .safetensors nor")
    state = torch.load(f"{published}_Network.pth", weights_only=True)
    del state["denoise_fn.out.2.bias"]
    torch.save(state, tmp_path / "short_Network.pth")
    refused("models", "import", tmp_path / "short", "--as", "m", says="1 keys missing (first: out.2.bias)")
    assert not left_in(models)


# URLs


def test_a_url_is_imported_and_its_checksum_printed(ours: Path, models: Path, server: str) -> None:
    status, output = emdvol("models", "import", f"{server}/ours.safetensors?download=1&key=secret", "--as", "far")
    assert status == 0 and f"ours.safetensors: sha256 {sha256(ours)}, not verified" in output
    origin = load_weights("far").metadata["origin"]
    assert origin == {"file": "ours.safetensors", "sha256": sha256(ours), "url": f"{server}/ours.safetensors"}
    assert left_in(models) == ["far.safetensors"]
    for given in (("--sha256", sha256(ours).upper()), ()):
        url = f"{server}/ours.safetensors" + ("" if given else f"#sha256={sha256(ours)}")
        status, output = emdvol("models", "import", url, "--as", "far", "--overwrite", *given)
        assert status == 0 and "not verified" not in output


def test_a_url_may_be_a_published_prefix(published: Path, tmp_path: Path, server: str) -> None:
    (tmp_path / "best_Network_ema.pth").symlink_to(f"{published}_Network_ema.pth")
    status, output = emdvol("models", "import", f"{server}/best?download=1", "--as", "liver", "--ema")
    assert status == 0, output
    assert load_weights("liver").metadata["origin"]["kind"] == "EMA"


def test_another_file_than_the_checksum_says_is_never_used(ours: Path, models: Path, server: str) -> None:
    url, wrong = f"{server}/ours.safetensors", "0" * 64
    refused("models", "import", url, "--as", "far", "--sha256", wrong, says=f"SHA-256 {sha256(ours)}, expected {wrong}")
    refused("models", "show", f"{url}#sha256={wrong}", says=f"expected {wrong}")
    refused("models", "import", f"{url}#sha256={wrong}", "--as", "far", "--sha256", sha256(ours), says="one of them")
    refused("models", "import", f"{url}#md5=1", "--as", "far", says="expected #sha256=HEX")
    assert not left_in(models)


def test_a_download_that_was_cut_off_is_never_used(ours: Path, models: Path, server: str) -> None:
    size = ours.stat().st_size
    said = f"cut off after {size // 2:,} of {size:,} bytes; try again"
    refused("models", "import", f"{server}/cut/ours.safetensors", "--as", "far", says=said)
    refused("models", "show", f"{server}/cut/ours.safetensors#sha256={sha256(ours)}", says=said)
    # A server that does not say how long the file is.
    silent = f"{server}/cut/ours.safetensors?silent"
    refused("models", "show", f"{silent}#sha256={sha256(ours)}", says="the file is not used")
    refused("models", "import", silent, "--as", "far", says="damaged or no safetensors file")
    assert not left_in(models)


def test_a_process_killed_while_it_downloads_leaves_no_weights(ours: Path, models: Path, server: str) -> None:
    killed = f"{server}/slow/ours.safetensors#sha256={sha256(ours)}"
    for arguments in (["import", killed, "--as", "far"], ["show", killed]):
        Handler.halfway.clear()
        process = subprocess.Popen([sys.executable, "-m", "emdiffuse_vol", "models", *arguments])
        assert Handler.halfway.wait(120)
        process.kill()
        process.wait()
    assert left_in(models) and all(Path(file).name.startswith(".part-") for file in left_in(models))
    assert [weights["name"] for weights in shown("list")] == list(embedded())
    assert emdvol("models", "import", killed.replace("/slow", ""), "--as", "far")[0] == 0
    assert load_weights(killed.replace("/slow", "")).sha256 == sha256(ours)


def test_many_may_fetch_the_same_at_once(ours: Path, models: Path, server: str) -> None:
    url = f"{server}/ours.safetensors#sha256={sha256(ours)}"
    with ThreadPoolExecutor(8) as pool:
        found = {weights.sha256 for weights in pool.map(load_weights, [url] * 8)}
    assert found == {sha256(ours)}
    assert left_in(models) == [f"downloads/{sha256(ours)}/ours.safetensors"]


def test_what_cannot_be_had_is_said_in_one_line(models: Path, server: str) -> None:
    refused("models", "import", f"{server}/absent.pth", "--as", "far", says="absent.pth cannot be had: 404")
    refused("models", "import", "http://127.0.0.1:9/x.pth", "--as", "far", says="cannot be had: [Errno")
    refused("models", "import", "http://[/x.pth", "--as", "far", says="are no URL")
    assert not left_in(models)


def test_weights_by_url_are_fetched_once(ours: Path, models: Path, server: str) -> None:
    url = f"{server}/ours.safetensors#sha256={sha256(ours)}"
    first, second = load_weights(url), load_weights(url)
    assert first.path == second.path == models / "downloads" / sha256(ours) / "ours.safetensors"
    assert first.name == "ours" and Handler.seen == ["/ours.safetensors"]
    first.path.write_bytes(b"damaged since")
    assert load_weights(url).sha256 == sha256(ours)
    assert len(Handler.seen) == 2
    refused("models", "show", f"{server}/ours.safetensors", says="add it to the URL as #sha256=HEX")
    refused("models", "show", f"{server}/ours.zip#sha256={'0' * 64}", says="neither .safetensors nor")


def test_names_of_files_and_urls_hold_nothing_they_should_not() -> None:
    assert file_name("https://h/a/..%2F..%2Fevil.pth?x=1") == "evil.pth"
    assert file_name("https://h/a/%2e%2e") == "weights"
    assert public("https://user:word@h:1/a.pth?key=1#x") == "https://h:1/a.pth"


# Where weights are used


def test_weights_of_a_run_go_by_name_path_or_url(ours: Path, tmp_path: Path, server: str) -> None:
    emdvol("models", "import", ours, "--as", "mine")
    stack = write_volume(tmp_path / "in.zarr", smooth_volume((4, 40, 50)), (50, 10, 10))
    run = ["reconstruct", stack, "--out", tmp_path / "out.zarr", "--dry-run", "--json", "--weights"]
    for weights, name in (
        ("mine", "mine"),
        (ours, "ours"),
        (f"{server}/ours.safetensors#sha256={sha256(ours)}", "ours"),
    ):
        status, output = emdvol(*run, weights)
        assert status == 0 and json.loads(output)["weights"] == name
    refused(*run, f"{server}/ours.safetensors", says="come without a checksum")
    refused(*run, "yours", says=f"a name among: {', '.join(embedded())}, mine")


def test_a_run_refuses_another_factor_or_mode_than_the_weights_serve(published: Path, tmp_path: Path) -> None:
    emdvol("models", "import", published, "--as", "liver", "--factor", 6, "--mode", "vEMDiffuse-i")
    run = ["reconstruct", "--out", tmp_path / "out.zarr", "--dry-run", "--weights", "liver", "--mode", "vEMDiffuse-i"]
    six = write_volume(tmp_path / "6.zarr", smooth_volume((4, 64, 64)), (48, 8, 8))
    five = write_volume(tmp_path / "5.zarr", smooth_volume((4, 64, 64)), (40, 8, 8))
    assert emdvol(*run, six)[0] == 0
    refused(*run, six, "--mode", "vEMDiffuse-a", says="liver serve vEMDiffuse-i, not vEMDiffuse-a")
    refused(*run, six, "--factor", 5, says="liver serve factor 6 alone, not 5")
    refused(*run, five, says="liver serve factor 6 alone, not 5")
    refused(*run, five, "--factor", 6, says="serve sections 5.5 to 6.5 pixels apart, not 5")


def test_a_worker_finds_weights_whose_path_is_another_machines(ours: Path, server: str) -> None:
    emdvol("models", "import", ours, "--as", "mine")
    mine = load_weights("mine")
    assert load_weights("/elsewhere/models/mine.safetensors", mine.sha256).path == mine.path
    far = load_weights(f"{server}/ours.safetensors#sha256={sha256(ours)}")
    assert load_weights("/elsewhere/ours.safetensors", far.sha256).path == far.path
    for path, known in (("/elsewhere/mine.safetensors", None), ("/elsewhere/mine.safetensors", "0" * 64)):
        with pytest.raises(WeightsError, match="no weights /elsewhere/mine"):
            load_weights(path, known)


def test_a_relative_path_is_made_absolute(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job carries it to processes that work elsewhere."""
    monkeypatch.chdir(ours.parent)
    assert load_weights(ours.name).path == ours


def test_embedded_weights_need_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EMDVOL_MODELS", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it does for a user that the system does not know
    assert load_weights().name == EMBEDDED


# Symmetry


def between(sections: Tensor, count: int, true_factor: int) -> Tensor:
    """Planes 0 to count - 1 as a network of ``true_factor`` that interpolates linearly would give them."""
    lower, higher = sections[3], sections[4]
    t = (torch.arange(count) + 1)[:, None, None] / true_factor
    return torch.lerp(lower, higher, t)


@pytest.fixture
def sections() -> Tensor:
    return torch.from_numpy(smooth_volume((8, 32, 32), dtype="float32")) / 100


def test_a_network_that_interpolates_mirrors(sections: Tensor) -> None:
    found = compare(lambda stack, n: between(stack, n, 6), sections, 6, [5, 6, 7])
    assert found.complaint is None and max(found.mismatch) < 1e-5
    assert found.position == pytest.approx([k / 6 for k in range(1, 6)], abs=1e-5)
    assert found.factors[5] > 0.1 and found.factors[7] > 0.1


def test_weights_of_another_factor_are_found_out(sections: Tensor) -> None:
    for of in (5, 7):
        found = compare(lambda stack, n, of=of: between(stack, n, of), sections, 6, [5, 6, 7])
        assert found.complaint is not None and f"as those of factor {of}, not 6" in found.complaint


def test_weights_that_saw_one_section_twice_are_found_out(sections: Tensor) -> None:
    found = compare(lambda stack, n: stack[3:5].mean(0).expand(n, -1, -1), sections, 6, [5, 6, 7])
    assert found.complaint is not None and "the same section on both sides" in found.complaint
    found = compare(lambda stack, n: between(stack, n, 6) + stack[4] / 2, sections, 6, [6])
    assert found.complaint is not None and "do not mirror" in found.complaint


def test_the_embedded_weights_mirror() -> None:
    found = shown("check", EMBEDDED)
    assert found["complaint"] is None and found["factor"] == 6
    assert max(found["mismatch"]) < 0.15


def test_check_takes_sections_from_a_volume(ours: Path, tmp_path: Path) -> None:
    stack = write_volume(tmp_path / "in.zarr", smooth_volume((12, 100, 100)), (40, 10, 10))
    status, output = emdvol("models", "check", ours, "--input", stack)
    assert status == 0 and "mismatch on average" in output and "as they should" in output
    assert len([line for line in output.splitlines() if line[:1].isdigit()]) == 3


def test_check_of_published_weights_ends_with_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetry, "SIZE", 32)
    torch.manual_seed(0)
    state = MODELS["unet-vem"]().state_dict()
    torch.save({f"denoise_fn.{key}": value for key, value in state.items()}, tmp_path / "best_Network.pth")
    refused("models", "check", tmp_path / "best_Network.pth", says="do not say which factor they serve; give --factor")
    emdvol("models", "import", tmp_path / "best", "--as", "untrained", "--factor", 3)
    refused("models", "check", "untrained", says="untrained fail the check")
    refused("models", "check", "untrained", "--factor", 4, says="serve factor 3 alone, not 4")


def test_networks_of_one_section_have_nothing_to_mirror(tmp_path: Path) -> None:
    torch.save(published_state("unet-2d"), tmp_path / "best_Network.pth")
    refused("models", "check", tmp_path / "best_Network.pth", "--factor", 2, says="see one section at a time")
