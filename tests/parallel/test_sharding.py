"""Weights, gradients and moments sharded over processes: the run of one process, checkpoints in parts, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import mpp
from mpp.errors import UserError
from mpp.inspection.replay import replay
from mpp.parallel.sharding import blocks
from mpp.runs import checkpoint
from mpp.runs.records import checkpoints_in, read_metrics
from tests.conftest import command, pretrain_recipe, pretrain_values
from tests.pretraining.test_pretraining import GOLDEN, OBJECTIVES, losses
from tests.training.test_nonfinite import DIVERGES

TINY_SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "args": {
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
        "drop_path_rate": 0.0,
    },
}
MORE: dict[str, dict[str, Any]] = {
    "activation checkpointing": {"encoder.grad_checkpointing": True},
    "micro-batches": {"optim.max_batch_per_device": 4},
    "stages, a part predicted": {"encoder": TINY_SWIN, "predict_fraction": 0.5},
    "bf16": {"precision": "bf16", "predict_fraction": 0.5, "corruption.enter": 1},
    "a probe of averaged weights": {"probe": True},
}


def values_of(shards: Path, image_folder: Path, out: Path, name: str) -> dict[str, Any]:
    changes = {**OBJECTIVES, **MORE}[name]
    if "probe" in changes:
        probe = {"train": str(image_folder), "val": str(image_folder), "every_steps": 10}
        changes = {"probe": probe, "ema_decay": 0.7}
    return pretrain_values(shards, out / name.replace(", ", "-").replace(" ", "-"), **changes)


def several(folder: Path, processes: int, *runs: tuple[dict[str, Any], str]) -> None:
    plan = folder / "plan.json"
    plan.write_text(json.dumps([{"values": values, "resume": resume} for values, resume in runs]))
    done = command(plan, processes=processes, module="tests.several_runs")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def sharded(shards: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every objective and more on two processes, each of which has its half."""
    out = tmp_path_factory.mktemp("sharded")
    every = ({**values_of(shards, image_folder, out, name), "fsdp": True} for name in (*OBJECTIVES, *MORE))
    several(out, 2, *((values, "never") for values in every))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_losses_are_those_of_one_process(objective: str, sharded: Path, shards: Path, image_folder: Path) -> None:
    found = losses(Path(values_of(shards, image_folder, sharded, objective)["out"]))
    np.testing.assert_allclose(found, json.loads(GOLDEN.read_text())[objective], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_so_is_all_that_is_measured(name: str, sharded: Path, shards: Path, image_folder: Path, tmp_path: Path) -> None:
    values = values_of(shards, image_folder, tmp_path, name)
    mpp.pretrain(values)
    found_in = Path(values_of(shards, image_folder, sharded, name)["out"])
    found = read_metrics(found_in)
    for here, there in zip(read_metrics(Path(values["out"])), found, strict=True):
        assert here.keys() == there.keys()
        assert {k for k in here if here[k] is None} == {k for k in there if there[k] is None}
        times = {"images_per_s", "data_wait", "probe_seconds", "cpu_minutes"}
        for key in here.keys() - {k for k in here if here[k] is None} - times:
            # in bf16, rounding depends on the number of images in a product
            assert there[key] == pytest.approx(here[key], rel=0.02 if name == "bf16" else 1e-4, abs=1e-6), key
    if "averaged" in name:
        weights = [load_file(Path(out) / "encoder" / "model.safetensors") for out in (values["out"], found_in)]
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


def left_at(step: int, run: Path, to: Path) -> Path:
    """Return a copy of a run as it was at a step."""
    shutil.copytree(run, to)
    for later in (to / "checkpoints").iterdir():
        if later.name > f"step-{step:08d}":
            shutil.rmtree(later)
    shutil.rmtree(to / "encoder")
    return to


@pytest.mark.slow
def test_a_run_resumes_on_other_processes(sharded: Path, shards: Path, image_folder: Path, tmp_path: Path) -> None:
    """A run in parts resumes as a whole, a whole resumes in parts, and a run in the same number of parts resumes bit by
    bit.
    """
    run, golden = sharded / "token-linear", json.loads(GOLDEN.read_text())["token, linear"]
    alone = left_at(15, run, tmp_path / "alone")
    mpp.pretrain(pretrain_values(shards, alone), resume="auto")
    np.testing.assert_allclose(losses(alone), golden, rtol=1e-4)
    assert not list((alone / "checkpoints" / "step-00000020").glob("*rank*"))
    averaged = values_of(shards, image_folder, sharded, "a probe of averaged weights")
    resumed_average = left_at(15, Path(averaged["out"]), tmp_path / "averaged")
    again, unsharded, parted = (
        left_at(15, run, tmp_path / "again"),
        left_at(15, run, tmp_path / "unsharded"),
        left_at(15, alone, tmp_path / "parted"),
    )
    several(
        tmp_path,
        2,
        (pretrain_values(shards, again, fsdp=True), "auto"),
        (pretrain_values(shards, unsharded), "auto"),
        (pretrain_values(shards, parted, fsdp=True), "auto"),
        ({**averaged, "out": str(resumed_average), "fsdp": True}, "auto"),
    )
    weights = [Path(out) / "encoder" / "model.safetensors" for out in (averaged["out"], resumed_average)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert losses(again) == losses(run)
    for resumed in (unsharded, parted):
        np.testing.assert_allclose(losses(resumed), golden, rtol=1e-4)


@pytest.mark.slow
def test_parts_that_do_not_divide_evenly(shards: Path, tmp_path: Path) -> None:
    three, alone, odd = tmp_path / "three", tmp_path / "alone", {"optim.global_batch_size": 24}
    several(tmp_path, 3, (pretrain_values(shards, three, **odd, fsdp=True), "never"))
    mpp.pretrain(pretrain_values(shards, alone, **odd))
    np.testing.assert_allclose(losses(three), losses(alone), rtol=1e-4)
    resumed = left_at(15, three, tmp_path / "resumed")
    mpp.pretrain(pretrain_values(shards, resumed, **odd), resume="auto")
    np.testing.assert_allclose(losses(resumed), losses(alone), rtol=1e-4)
    rows = {
        n: t.shape[0] for n, t in load_file(three / "checkpoints/step-00000020/model-rank2-of-3.safetensors").items()
    }
    assert rows["encoder.model.pos_embed"] == 0, "the first process must have the only row"
    assert rows["encoder.model.blocks.0.norm1.weight"] == 32 - 2 * 11


@pytest.mark.slow
def test_each_process_has_its_half(sharded: Path) -> None:
    saved = sharded / "token-linear" / "checkpoints" / "step-00000020"
    assert {p.name for p in saved.iterdir()} == {
        "model-rank0-of-2.safetensors", "model-rank1-of-2.safetensors", "optimizer-rank0-of-2.safetensors",
        "optimizer-rank1-of-2.safetensors", "state.json", "manifest.json",
    }  # fmt: skip
    assert checkpoint.broken(saved) is None
    for stem in ("model", "optimizer"):
        parts = [load_file(saved / f"{stem}-rank{rank}-of-2.safetensors") for rank in (0, 1)]
        sizes = [sum(t.numel() for t in part.values()) for part in parts]
        # tensors of one row cannot be halved: positions and tokens
        assert sizes[1] > 0.45 * sum(sizes), sizes
    (saved / "model-rank1-of-2.safetensors").rename(sharded / "aside")
    assert checkpoint.broken(saved) == "model-rank1-of-2.safetensors is missing"
    (sharded / "aside").rename(saved / "model-rank1-of-2.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", ["save.model_written", pytest.param("save.files_synced", marks=pytest.mark.exhaustive)]
)
def test_killed_while_it_writes_its_part(
    point: str, shards: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.json"  # JSON is also YAML
    recipe.write_text(json.dumps(pretrain_values(shards, tmp_path / "run", fsdp=True)))
    monkeypatch.setenv(
        "MPP_FAULT", json.dumps({"point": point, "nth": 2, "rank": 1, "do": "halve" if "model" in point else "kill"})
    )
    assert command("pretrain", recipe, processes=2).returncode != 0
    monkeypatch.delenv("MPP_FAULT")
    saves = tmp_path / "run" / "checkpoints"
    assert [p.name for p in checkpoints_in(saves)] == ["step-00000005"]
    done = command("pretrain", recipe, "--resume", "auto", processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(sharded / "token-linear")


@pytest.mark.slow
def test_a_step_that_is_left_out(shards: Path, tmp_path: Path) -> None:
    """A skipped step changes no weights and is kept in parts. One process can repeat it."""
    out = tmp_path / "run"
    changes = {"target.name": "ema_teacher", "checkpoint_every_steps": 1, "keep_checkpoints": 8, "optim.steps": 8}
    several(tmp_path, 2, (pretrain_values(shards, out, fsdp=True, **DIVERGES, **changes), "never"))
    skipped = [m["step"] for m in read_metrics(out) if m["loss"] is None]
    assert skipped
    for part in ("model-rank0-of-2.safetensors", "model-rank1-of-2.safetensors"):
        before, after = (load_file(out / "checkpoints" / f"step-{s:08d}" / part) for s in (skipped[0] - 1, skipped[0]))
        assert all(value.equal(after[name]) for name, value in before.items())
    assert replay(out).same


def test_on_one_process_there_is_nothing_to_share(shards: Path, tmp_path: Path) -> None:
    mpp.pretrain(pretrain_values(shards, tmp_path / "run", fsdp=True))
    np.testing.assert_allclose(losses(tmp_path / "run"), json.loads(GOLDEN.read_text())["token, linear"], rtol=1e-4)


def test_not_compiled(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^recipe: compile: cannot be combined with fsdp"):
        pretrain_recipe(shards, tmp_path / "run", fsdp=True, compile=True)


def test_what_is_gathered_at_once() -> None:
    """Blocks of plain ViTs, of stages and of nested lists are found. A block inside another comes before it."""
    vit, swin, twins = (
        timm.create_model(name, **args)
        for name, args in (
            ("vit_tiny_patch16_224", {"depth": 3}),
            ("swin_tiny_patch4_window7_224", {"depths": (1, 2, 1, 1)}),
            ("twins_svt_small", {"depths": (1, 1, 2, 1)}),
        )
    )
    assert blocks(vit) == list(vit.blocks)[::-1]
    assert [type(b).__name__ for b in blocks(swin)] == ["SwinTransformerBlock"] * 5
    assert len(blocks(twins)) == 5
    nested = nn.ModuleDict({"blocks": nn.Sequential(nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2))}))})
    assert [type(b).__name__ for b in blocks(nested)] == ["Linear", "ModuleDict"]


@pytest.mark.slow
def test_batch_norms_are_refused_in_one_line(shards: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    args = {"embed_dim": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "stem_width": [16, 32]}
    changes = {"encoder": {"name": "coatnet_nano_rw_224", "args": args}, "data.image_size": 64, "corruption": "zeros"}
    recipe.write_text(json.dumps(pretrain_values(shards, tmp_path / "run", **changes, fsdp=True)))
    done = command("pretrain", recipe, processes=2)
    assert done.returncode != 0
    assert "fsdp: encoder.model." in done.stderr
    assert "is a batch norm; use fsdp=false with this encoder" in done.stderr
    assert "mpp/parallel/sharding.py" not in done.stderr, "the user must not see a traceback"
