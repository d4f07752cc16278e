"""Steps that are left out must not change the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mpp
from mpp.errors import UserError
from mpp.runs.checkpoint import newest
from mpp.runs.records import read_metrics
from mpp.training.nonfinite import KEPT, BatchNormStatistics
from tests.conftest import pretrain_recipe
from tests.finetuning.test_finetuning import recipe

DIVERGES = {"optim.base_lr": 1e20, "optim.warmup_steps": 0, "max_skipped_steps": 50}


def test_statistics_of_batch_norms_are_what_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model(torch.randn(2, 3, 5, 5))
    before = {name: value.clone() for name, value in model.named_buffers()}
    statistics = BatchNormStatistics(model, needed=True)
    statistics.remember()
    model(torch.full((2, 3, 5, 5), torch.nan))
    assert not all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    changed = {name: value.clone() for name, value in model.named_buffers()}
    statistics.restore(unless=torch.tensor(True))
    for name, value in model.named_buffers():
        torch.testing.assert_close(value, changed[name], rtol=0, atol=0, equal_nan=True)
    statistics.restore(unless=torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.filterwarnings("ignore::mpp.errors.MppWarning")
def test_a_step_that_is_left_out_moves_nothing_and_the_last_few_are_kept(shards: Path, tmp_path: Path) -> None:
    """Otherwise the moving average of the encoder would move closer to its weights, which do not change."""
    each = {"checkpoint_every_steps": 1, "keep_checkpoints": 8, "optim.steps": 8}
    out = mpp.pretrain(
        pretrain_recipe(shards, tmp_path / "run", **{"target.name": "ema_teacher"}, **DIVERGES, **each)
    ).out
    skipped = [m["step"] for m in read_metrics(out) if m["loss"] is None]
    assert len(skipped) > KEPT
    assert sorted(p.name for p in (out / "non-finite").iterdir()) == [f"step-{s - 1:08d}" for s in skipped[-KEPT:]]
    first, last = (
        load_file(out / "checkpoints" / f"step-{s:08d}" / "model.safetensors") for s in (skipped[0], skipped[-1])
    )
    before = load_file(out / "checkpoints" / f"step-{skipped[0] - 1:08d}" / "model.safetensors")
    assert any("teacher" in name for name in first)
    for name, value in before.items():
        assert value.equal(first[name]), name
        assert value.equal(last[name]), name


@pytest.mark.filterwarnings("ignore::mpp.errors.MppWarning")
@pytest.mark.parametrize("job", ["pretrain", "finetune"])
def test_a_step_that_is_left_out_leaves_no_trace_in_batch_norms(job: str, shards: Path, tmp_path: Path) -> None:
    each = {"checkpoint_every_steps": 1, "keep_checkpoints": 4, "optim.steps": 4, "data.image_size": 32}
    if job == "pretrain":
        resnet = {"encoder": {"name": "resnet10t"}, "corruption": "zeros", "mask.unit_px": 32, "data.image_size": 64}
        folder = mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **{**each, **DIVERGES, **resnet})).out
    else:
        resnet = {"architecture": {"name": "resnet10t"}, "seeds": [0]}
        mpp.finetune(recipe(shards, tmp_path / "run", "scratch", **{**each, **DIVERGES, **resnet}))
        folder = tmp_path / "run" / "scratch-seed0"
    first = next(m["step"] for m in read_metrics(folder) if m["loss"] is None)
    before, after = (
        load_file(folder / "checkpoints" / f"step-{s:08d}" / "model.safetensors") for s in (first - 1, first)
    )
    statistics = [name for name in before if "running_" in name]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)


@pytest.mark.filterwarnings("ignore::mpp.errors.MppWarning")
def test_a_step_that_was_kept_is_no_checkpoint_to_go_on_from(shards: Path, tmp_path: Path) -> None:
    recipe = pretrain_recipe(shards, tmp_path / "run", **DIVERGES, **{"optim.steps": 4})
    kept = next((mpp.pretrain(recipe).out / "non-finite").iterdir())
    with pytest.raises(
        UserError, match=r"--resume .*: no checkpoint to continue from; use auto, or one of .*/other/ch"
    ):
        mpp.pretrain(recipe, out=str(tmp_path / "other"), resume=str(kept))


@pytest.mark.filterwarnings("ignore::mpp.errors.MppWarning")
def test_it_makes_no_difference_when_a_run_learns_of_it(shards: Path, tmp_path: Path) -> None:
    """A skipped step is detected at once if every step is logged, and otherwise during the next step."""
    found = []
    for often in (1, 100):
        changes = {"target.name": "ema_teacher", "log_every_steps": often, "skill_every_steps": 100, "optim.steps": 9}
        out = mpp.pretrain(pretrain_recipe(shards, tmp_path / str(often), **DIVERGES, **changes)).out
        kept = sorted((out / "non-finite").iterdir())
        weights = [load_file(p / "model.safetensors") for p in (*kept, newest(out / "checkpoints"))]
        losses = [json.loads((p / "rank0.json").read_text())["losses"] for p in kept]
        found.append(([p.name for p in kept], losses, weights, read_metrics(out)[-1]["skipped_steps"]))
    (names, losses, weights, skipped), later = found[0], found[1]
    assert len(names) == KEPT < skipped
    assert (names, losses, skipped) == (later[0], later[1], later[3])
    for at_once, one_later in zip(weights, later[2], strict=True):
        assert all(torch.equal(value, one_later[name]) for name, value in at_once.items())
