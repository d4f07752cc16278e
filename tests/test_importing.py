"""Weights from elsewhere: all of an encoder's or none, opened as tensors alone."""

from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import mpp
from mpp.errors import UserError
from tests.conftest import Runs, command

ARGS = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
NAME = "vit_tiny_patch16_224"


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Of a classifier: its head is no part of the encoder."""
    torch.manual_seed(0)
    return dict(timm.create_model(NAME, img_size=16, num_classes=3, **ARGS).state_dict())


def imported(file: Path, out: Path, **more: Any) -> Any:
    return mpp.import_weights(file, out, **{"model": NAME, "args": ARGS, "image_size": (16, 16), **more})


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "under state_dict, of a wrapped module": lambda s: {"state_dict": OrderedDict(prefixed(s, "module."))},
    "plain": lambda s: s,
    "under model": lambda s: {"model": s, "epoch": 3},
    "of a teacher beside a head": lambda s: {"teacher": prefixed(s, "backbone.") | {"head.last.weight": torch.ones(3)}},
    "beside a step": lambda s: {"model": s, "step": torch.tensor(3)},
    "in a state_dict of a model": lambda s: {"model": {"state_dict": s}},
    "beside arguments": lambda s: {"model": s, "args": argparse.Namespace(lr=1)},
    "half precision": lambda s: {k: v.half() for k, v in s.items()},
    "beside another network": lambda s: prefixed(s, "encoder.") | {"decoder.blocks.0.norm1.weight": torch.ones(4)},
}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow if i else ()) for i, name in enumerate(LAYOUTS)]
)
def test_all_weights_come_over(layout: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout](state), tmp_path / "w.pth")
    found = imported(tmp_path / "w.pth", tmp_path / "e", trust=True)
    assert found.verified.difference < 1e-5
    assert any(name.endswith("head.weight") for name in found.left_out)
    model = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True)
    assert model.num_classes == 0
    for name, value in model.state_dict().items():
        expected = state[name].half().float() if "half" in layout else state[name]
        assert torch.equal(value, expected), name
    card = (tmp_path / "e" / "README.md").read_text()
    assert "Weights of `w.pth` in timm's `vit_tiny_patch16_224`." in card
    assert "recipe.yaml" not in card


def test_safetensors_need_no_trust_whatever_the_name(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.pth")
    assert imported(tmp_path / "w.pth", tmp_path / "e").left_out == ["head.bias", "head.weight"]


@pytest.mark.slow
def test_an_import_is_an_encoder_like_any_other(state: dict[str, Tensor], shards: Path, tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.safetensors")
    words = ["--model", NAME, "--image-size", "16", *(f"{k}={v}" for k, v in ARGS.items())]
    done = command("import", tmp_path / "w.safetensors", tmp_path / "e", *words)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.endswith("load through plain timm; features differ by 0.0e+00")
    half = "[0.5, 0.5, 0.5]"
    assert second == f"2 tensors left out (head.bias, head.weight); mean {half} and std {half} are timm's for this name"
    mpp.export(tmp_path / "e", tmp_path / "again")
    data = {"data.train": str(shards), "data.val": str(shards / "shard-000000.tar"), "data.image_size": 16}
    options: dict[str, Any] = {"optim.steps": 1, "optim.epochs": None, "seeds": [0], "data.workers": 0}
    with pytest.warns(mpp.MppWarning, match="among data.train"):
        tuned = mpp.finetune(
            {"job": "finetune", "out": str(tmp_path / "ft"), "encoder": str(tmp_path / "again")},
            **data,
            **options,
        )
    assert tuned.state == "finished"


@pytest.mark.parametrize("by_torch", [True, False])
def test_pickles(by_torch: bool, state: dict[str, Tensor], tmp_path: Path) -> None:
    """Not opened unless trusted; nothing of theirs runs even then."""
    file, poison = tmp_path / "w.safetensors", {"model": state, "hook": Runs(tmp_path / "mark")}
    torch.save(poison, file) if by_torch else file.write_bytes(pickle.dumps(poison))
    with pytest.raises(UserError, match=r"w\.safetensors: a pickle, which may run any code .* --trust opens it"):
        imported(file, tmp_path / "e")
    with pytest.raises(
        UserError, match=r"holds more than tensors and plain containers: \w+\.mkdir" if by_torch else "not of torch"
    ) as error:
        imported(file, tmp_path / "e", trust=True)
    assert "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"w.safetensors"}


def test_one_of_two_encoders(state: dict[str, Tensor], tmp_path: Path) -> None:
    other = {name: value + 1 for name, value in state.items()}
    torch.save({"student": state, "teacher": prefixed(other, "module.")}, tmp_path / "w")
    found = imported(tmp_path / "w", tmp_path / "e", trust=True, prefix="teacher.module.")
    assert str(found).startswith("from teacher.module.*; ")
    model = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True)
    assert torch.equal(model.state_dict()["norm.bias"], state["norm.bias"] + 1)


def test_a_byte_that_changed(state: dict[str, Tensor], tmp_path: Path) -> None:
    """torch does not compare the checksums of its files."""
    torch.save(state, tmp_path / "w")
    data = bytearray((tmp_path / "w").read_bytes())
    data[data.index(state["blocks.0.mlp.fc1.weight"].numpy().tobytes()) + 3] ^= 0x80
    (tmp_path / "w").write_bytes(data)
    assert torch.load(tmp_path / "w", weights_only=True).keys() == state.keys()
    with pytest.raises(UserError, match="w: damaged, or not of torch.save: BadZipFile"):
        imported(tmp_path / "w", tmp_path / "e", trust=True)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match=": not a file"):
            imported(place, tmp_path / "e", trust=True)


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda s: {k: v for k, v in s.items() if k != name}


def looped(state: dict[str, Tensor]) -> Any:
    found: dict[str, Any] = {}
    found |= {f"model{i}": found for i in range(20)}
    return found


class Odd(OrderedDict[str, Tensor]):
    """Opened, it is an OrderedDict whose `items` is a number."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), {"items": 5}


WRONG: list[tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = [
    (without("norm.bias"), {}, r"1 of \d+ weights of vit_tiny_patch16_224: missing: norm\.bias; it holds cls_token"),
    (lambda s: {"a": torch.ones(1)}, {}, r"missing: cls_token, pos_embed, .* and \d+ more; it holds a"),
    (
        lambda s: s,
        {"image_size": (32, 32)},
        r"have other shapes: pos_embed \(1, 17, 16\), wanted \(1, 65, 16\); is the",
    ),
    (lambda s: s, {"image_size": (17, 17)}, "image_size: vit_tiny_patch16_224 has a stride of 4 px; got 17×17"),
    (lambda s: s | {"norm.bias": torch.full((16,), torch.nan)}, {}, r"weights that are not finite: norm\.bias"),
    (lambda s: s | {"norm.bias": torch.full((16,), 1e300, dtype=torch.float64)}, {}, r"not finite: norm\.bias"),
    (lambda s: {"epoch": 3, "args": {"lr": 1}}, {}, "missing: cls_token, .*; it holds no weights by name"),
    (lambda s: [1, 2], {}, "it holds no weights by name"),
    (lambda s: {}, {}, "it holds no weights by name"),
    (looped, {}, "it holds no weights by name"),
    (lambda s: Odd(s), {}, "it holds no weights by name"),
    (
        lambda s: {"student": s, "teacher": dict(s)},
        {},
        r"holds 2 whole encoders; say which by --prefix: student\., teacher\.",
    ),
    (lambda s: s | {"norm.bias": s["norm.bias"].to(torch.int8)}, {}, r"of their kind: norm\.bias \(torch\.int8\)"),
    (lambda s: s | {"norm.bias": s["norm.bias"] + 1j}, {}, r"of their kind: norm\.bias \(torch\.complex64\)"),
    (lambda s: s | {"norm.bias": s["norm.bias"].to_sparse()}, {}, r"of their kind: norm\.bias"),
    (lambda s: s | {"norm.bias": s["norm.bias"].to("meta")}, {}, r"of their kind: norm\.bias"),
    (lambda s: {"\x1b[31m" + "n" * 999: torch.ones(1)}, {}, r"it holds \\u001b\[31mn{50,80}…$"),
    (lambda s: s, {"model": "vit_tinny_patch16_224"}, "model: timm .* has no model .* Did you mean"),
    (lambda s: s, {"model": "vit_tiny_*"}, r"model: 'vit_tiny_\*': allowed is a name of timm's"),
    (lambda s: s, {"model": "hf-hub:a/b"}, "model: 'hf-hub:a/b': allowed is a name of timm's"),
    (lambda s: s, {"args": {"dept": 1}}, "args: vit_tiny_patch16_224 does not take this"),
    (lambda s: s, {"args": {"img_size": 1}}, "args.img_size: is what --image-size says"),
    (lambda s: s, {"args": {"checkpoint_path": "a.pth"}}, "args.checkpoint_path: weights from elsewhere come by"),
    (
        lambda s: {"model": s, "out": Path("/runs")},
        {},
        r"holds more than tensors and plain containers: pathlib\.\w*Path",
    ),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_does_not_fit(number: int, state: dict[str, Tensor], tmp_path: Path) -> None:
    change, options, message = WRONG[number]
    torch.save(change(state), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message) as error:
        imported(tmp_path / "w.pth", tmp_path / "e", trust=True, **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "neither a safetensors file nor one of torch's"),
        (b"<html>", "neither a safetensors file nor one of torch's"),
        ((100).to_bytes(8, "little") + b'{"a": 1' + bytes(200), "no whole safetensors file"),
        (b"\x80\x04", "damaged, or not of torch"),
        ((1 << 40).to_bytes(8, "little") + b'{"a": 1', "no whole safetensors file"),
        (b"PK\x03\x04", "damaged, or not of torch"),
        (b"PK\x05\x06" + bytes(18), "damaged, or not of torch"),
        (None, "No such file"),
    ],
)
def test_files_that_are_none(data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "w").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        imported(tmp_path / "w", tmp_path / "e", trust=True)
    assert "\n" not in str(error.value)


def test_a_folder_with_something_in_it_is_left_as_it_is(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "w")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine").write_text("")
    with pytest.raises(UserError, match="not empty; give a new folder"):
        imported(tmp_path / "w", tmp_path / "e")
    assert [p.name for p in (tmp_path / "e").iterdir()] == ["mine"]
