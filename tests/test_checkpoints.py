"""Weights files: what is written is read back, and what does not fit is refused in one line."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from emdiffuse_vol.errors import WeightsError
from emdiffuse_vol.models import registry
from emdiffuse_vol.models.checkpoints import MODELS, PUBLISHED_BUFFERS, Weights, load_weights, save_weights
from emdiffuse_vol.models.slab import SlabNet

CONFIG = {"width": 4, "deep": 8, "blocks": 1}
FACTS: dict[str, Any] = {"name": "tiny", "gaps": [2, 12], "calibration": {"scale": {"5": 1.25}}, "greys": "percentiles"}
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def no_imported_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMDVOL_MODELS", str(tmp_path / "none"))


def saved(path: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {"architecture": "slab", "config": CONFIG, "modes": ["vEMDiffuse-a"], **FACTS}
    save_weights(path, SlabNet(**CONFIG), **(arguments | changes))
    return path


def refusal(path: Path | str) -> str:
    with pytest.raises(WeightsError) as caught:
        load_weights(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def published_state(architecture: str) -> State:
    """Keys and shapes of a released `_Network.pth`; every tensor is told from the others by its value."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in MODELS[architecture]().state_dict().items()}
    state = {f"denoise_fn.{key}": torch.full(shape, n / 512) for n, (key, shape) in enumerate(shapes.items())}
    return state | {key: torch.zeros(2000) for key in PUBLISHED_BUFFERS}


def thin(state: State) -> State:
    """The same names and ranks with few elements, where only names matter."""
    return {key: value.flatten()[:1].reshape([1] * value.ndim) for key, value in state.items()}


def test_saved_weights_come_back_whole(tmp_path: Path) -> None:
    net = SlabNet(**CONFIG)
    path = tmp_path / "file.safetensors"
    save_weights(path, net, architecture="slab", config=CONFIG, modes=["vEMDiffuse-a"], **FACTS)
    weights = load_weights(str(path))
    assert (weights.name, weights.path, weights.architecture, weights.config) == ("tiny", path, "slab", CONFIG)
    assert weights.metadata == {**FACTS, "modes": ["vEMDiffuse-a"]}
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    state = weights.net.state_dict()
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


def test_networks_come_ready_for_inference(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    net = SlabNet(**CONFIG).bfloat16()
    save_weights(path, net, architecture="slab", config=CONFIG, modes=[])
    loaded = load_weights(str(path)).net
    assert not loaded.training
    assert {(p.dtype, p.device.type, p.requires_grad) for p in loaded.parameters()} == {(torch.float32, "cpu", False)}
    assert torch.equal(loaded.state_dict()["inp.weight"], net.state_dict()["inp.weight"].float())


def test_loading_draws_nothing_from_the_global_generator(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.safetensors")
    before = torch.random.get_rng_state()
    load_weights(str(path))
    assert torch.equal(before, torch.random.get_rng_state())


def test_embedded_weights_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "some-name.safetensors")
    monkeypatch.setattr(registry, "embedded", lambda: {"some-name": path})
    assert load_weights("some-name").path == path
    assert "a name among: some-name" in refusal("other-name")


@pytest.mark.parametrize("architecture", ["unet-vem", "unet-2d"])
def test_published_files_are_recognised_and_load_whole(tmp_path: Path, architecture: str) -> None:
    state = published_state(architecture)
    path = tmp_path / "best_Network.pth"
    torch.save(state, path)
    weights = load_weights(str(path))
    assert (weights.name, weights.architecture, weights.metadata["greys"]) == ("best_Network", architecture, "dtype")
    loaded = weights.net.state_dict()
    assert len(loaded) == len(state) - 6
    assert all(torch.equal(value, state[f"denoise_fn.{key}"]) for key, value in loaded.items())


def test_a_published_file_without_its_schedule_loads_too(tmp_path: Path) -> None:
    path = tmp_path / "best_Network_ema.pth"
    state = published_state("unet-2d")
    torch.save({key: value for key, value in state.items() if key not in PUBLISHED_BUFFERS}, path)
    assert load_weights(str(path)).architecture == "unet-2d"


def test_no_other_buffer_than_the_schedule_is_dropped(tmp_path: Path) -> None:
    state = thin(published_state("unet-2d")) | {"betas": torch.zeros(1)}
    state["denoise_fn.input_blocks.0.0.weight"] = torch.zeros(32, 2, 3, 3)
    torch.save(state, tmp_path / "best_Network.pth")
    assert "1 unexpected (first: betas)" in refusal(tmp_path / "best_Network.pth")


def test_keys_that_do_not_fit_are_counted_and_named(tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in SlabNet(**CONFIG).state_dict().items()}
    for key in ("embed.0.weight", "embed.0.bias", "out.bias"):
        del state[key]
    state |= {"extra": torch.zeros(1), "other": torch.zeros(1), "mix.bias": torch.zeros(5)}
    path = tmp_path / "file.safetensors"
    save_file(state, path, {"architecture": "slab", "config": json.dumps(CONFIG), "modes": "[]"})
    assert refusal(path) == (
        f"weights {path} do not fit architecture slab: 3 keys missing (first: embed.0.weight), "
        "2 unexpected (first: extra), 1 of another shape (first: mix.bias: found (5,), expected (4,))"
    )


def test_only_what_is_wrong_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.safetensors", config=CONFIG | {"blocks": 2})
    message = refusal(path)
    assert "keys missing (first: middle.1." in message
    assert "unexpected" not in message
    assert "shape" not in message


def test_other_files_are_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.safetensors").read_bytes()
    for content in (b"", b"no tensors here", whole[:-100]):
        (tmp_path / "bad.safetensors").write_bytes(content)
        assert "damaged or no safetensors file" in refusal(tmp_path / "bad.safetensors")
    for content in (b"", b"no tensors here", b"PK\x03\x04 broken"):
        (tmp_path / "bad.pth").write_bytes(content)
        assert "or are damaged" in refusal(tmp_path / "bad.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    assert "lack architecture" in refusal(tmp_path / "bare.safetensors")
    (tmp_path / "net.onnx").touch()
    assert "neither .safetensors nor" in refusal(tmp_path / "net.onnx")
    assert "no weights" in refusal(tmp_path / "absent.safetensors")
    assert "no weights" in refusal(tmp_path)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"denoise_fn.a": Trap()}, tmp_path / "trap.pth")
    assert "something else than tensors" in refusal(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"weight": torch.zeros(1)}])
def test_a_pth_that_is_no_published_network_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pth")
    message = refusal(tmp_path / "x.pth")
    assert "no state dict" in message or "not of EMDiffuse" in message


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"architecture": "transformer"},
            "architecture transformer; known: slab, slab-ensemble, plane, section, unet-vem, unet-2d",
        ),
        ({"config": {"depth": 3}}, "config that slab does not take"),
        ({"config": [3]}, "config that slab does not take"),
    ],
)
def test_headers_that_build_nothing_are_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    assert complaint in refusal(saved(tmp_path / "file.safetensors", **changes))


def test_a_header_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"architecture": "slab", "config": "{}", "modes": "vEMDiffuse-a"})
    assert "not JSON" in refusal(path)


def test_modes_and_gaps_are_checked(tmp_path: Path) -> None:
    weights = load_weights(str(saved(tmp_path / "file.safetensors")))
    weights.check("vEMDiffuse-a", 2)
    weights.check("vEMDiffuse-a", 5.5)
    with pytest.raises(WeightsError, match="tiny serve vEMDiffuse-a, not EMDiffuse-r"):
        weights.check("EMDiffuse-r", 5)
    with pytest.raises(WeightsError, match=r"serve sections 2 to 12 pixels apart, not 12\.5"):
        weights.check("vEMDiffuse-a", 12.5)


def test_weights_of_one_factor_serve_no_other() -> None:
    weights = Weights("w", Path("w"), "", "unet-vem", {}, {"modes": ["m"], "factor": 10}, torch.nn.Identity())
    assert weights.gaps == (9.5, 10.5)
    weights.check("m", 45 / 4.3, Fraction(10))
    with pytest.raises(WeightsError, match=r"w serve factor 10 alone, not 21/2; .* --factor 10"):
        weights.check("m", 10.3, Fraction(21, 2))
    with pytest.raises(WeightsError, match=r"serve sections 9\.5 to 10\.5 pixels apart, not 5"):
        weights.check("m", 5, Fraction(10))


def test_weights_that_know_no_gaps_take_any() -> None:
    net = torch.nn.Identity()
    Weights("w", Path("w"), "", "unet-vem", {}, {"modes": ["vEMDiffuse-i"]}, net).check("vEMDiffuse-i", 17)
