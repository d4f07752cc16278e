"""Adapters: only they are trained, they are merged into a plain timm model, and the run resumes bit by bit."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import mpp
from mpp.errors import UserError
from mpp.finetuning import lora
from tests.conftest import command
from tests.finetuning.test_finetuning import recipe, values

SHORT = {"optim.steps": 6, "seeds": [0], "checkpoint_every_steps": 3, "lora": {"rank": 4}}
VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "img_size": 32}


@pytest.mark.parametrize(
    ("name", "args", "side"),
    [("vit_tiny_patch16_224", VIT, 16), ("convnextv2_atto", CONVNEXT, 32), ("swin_tiny_patch4_window7_224", SWIN, 32)],
)
def test_they_begin_as_nothing_and_merge_into_the_plain_model(name: str, args: dict[str, Any], side: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **args).eval()
    x, state = torch.randn(2, 3, side, side), {k: v.clone() for k, v in model.state_dict().items()}
    plain = model(x)
    lora.add(model, rank=3, alpha=6, dropout=0.0)
    assert torch.equal(model(x), plain)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    for p in trained.values():
        p.data.normal_(0, 0.1)
    adapted = model(x)
    assert (adapted - plain).abs().max() > 1e-3
    lora.merge(model)
    assert list(model.state_dict()) == list(state)
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-4)


def test_a_run(shards: Path, run: Path, tmp_path: Path) -> None:
    result = mpp.finetune(recipe(shards, tmp_path / "ft", run, **SHORT, ema_decay=0.9))
    assert result.score.keys() == {"pretrained", "scratch"}
    before = load_file(run / "encoder" / "model.safetensors")
    trials = {approach: tmp_path / "ft" / f"{approach}-seed0" for approach in result.score}
    after = load_file(trials["pretrained"] / "encoder" / "model.safetensors")
    assert before.keys() <= after.keys()
    for name, value in before.items():
        linear = name.startswith("blocks") and name.endswith("weight") and value.ndim == 2
        assert torch.equal(after[name], value) != linear, f"{name}: only matrices of blocks must change"
    delta = after["blocks.0.mlp.fc1.weight"] - before["blocks.0.mlp.fc1.weight"]
    assert torch.linalg.matrix_rank(delta, rtol=1e-3) == 4
    assert mpp.verify(trials["pretrained"]).difference <= 1e-5
    scratch = load_file(next((trials["scratch"] / "checkpoints").iterdir()) / "model.safetensors")
    assert not any("lora_" in name for name in scratch), "the approach from scratch must train all its weights"


def test_killed_and_resumed_it_is_the_same(shards: Path, run: Path, tmp_path: Path) -> None:
    whole = mpp.finetune(recipe(shards, tmp_path / "whole", run, **SHORT, beside=[]))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    trial, other = (tmp_path / o / "pretrained-seed0" for o in ("whole", "cut"))
    (other / "result.json").unlink()
    shutil.rmtree(other / "encoder")
    shutil.rmtree(other / "checkpoints" / "step-00000006")
    again = mpp.finetune(recipe(shards, tmp_path / "cut", run, **SHORT, beside=[]), resume="auto")
    assert again.score == whole.score
    a, b = (load_file(c / "encoder" / "model.safetensors") for c in (trial, other))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.exhaustive
def test_on_two_processes_the_losses_are_those_of_one(shards: Path, run: Path, tmp_path: Path) -> None:
    import yaml

    from mpp.runs.records import read_metrics

    for out, processes in (("one", 1), ("two", 2)):
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(values(shards, tmp_path / out, run, **SHORT, beside=[])))
        done = command("finetune", path, processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = ([m["loss"] for m in read_metrics(tmp_path / o / "pretrained-seed0")] for o in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


def test_what_is_refused(shards: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="lora: cannot be combined with frozen: 1"):
        recipe(shards, tmp_path / "a", run, lora={}, frozen=1)
    with pytest.raises(UserError, match=r"lora\.rank: must be >= 1; got 0"):
        recipe(shards, tmp_path / "a", run, lora={"rank": 0})
    part = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
    part[1].requires_grad_(False)
    lora.add(part, rank=2, alpha=2, dropout=0.0)
    assert {n.split(".")[0] for n, p in part.named_parameters() if p.requires_grad} == {"0"}, (
        "frozen layers must get no adapters"
    )
    with pytest.raises(UserError, match="lora: Sequential has no linear layers for adapters"):
        lora.add(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), rank=2, alpha=2, dropout=0.0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lora: requires the package peft: pip install peft"):
        mpp.finetune(recipe(shards, tmp_path / "b", run, **SHORT))
    assert not (tmp_path / "b").exists(), "the run must be refused before anything is made"
    assert json.loads((run / "encoder" / "export.json").read_text())
