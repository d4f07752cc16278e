"""Weights from elsewhere: all of an encoder's or none, opened as tensors alone."""

from __future__ import annotations

import argparse
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
from tests.conftest import command

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
    "of a teacher beside a student": lambda s: {"teacher": prefixed(s, "backbone."), "student": prefixed(s, "x.")},
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
    assert second == "left out: 2 of its tensors, such as head.bias, head.weight"
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


class Runs:
    """Leaves a folder behind where it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (str(self.mark),)


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


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda s: {k: v for k, v in s.items() if k != name}


WRONG: list[tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = [
    (without("norm.bias"), {}, r"1 of \d+ weights of vit_tiny_patch16_224: missing: norm\.bias; it holds cls_token"),
    (lambda s: {"a": torch.ones(1)}, {}, r"missing: cls_token, pos_embed, .* and \d+ more; it holds a"),
    (
        lambda s: s,
        {"image_size": (32, 32)},
        r"have other shapes: pos_embed \(1, 17, 16\), wanted \(1, 65, 16\); is the",
    ),
    (lambda s: s | {"norm.bias": torch.full((16,), torch.nan)}, {}, r"weights that are not finite: norm\.bias"),
    (lambda s: {"epoch": 3, "args": {"lr": 1}}, {}, r"no weights: it holds epoch, args; known are model, state_dict"),
    (lambda s: [1, 2], {}, "no weights by name: a list"),
    (lambda s: s, {"model": "vit_tinny_patch16_224"}, "model: timm .* has no model .* Did you mean"),
    (lambda s: s, {"args": {"dept": 1}}, "args: vit_tiny_patch16_224 does not take this"),
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
