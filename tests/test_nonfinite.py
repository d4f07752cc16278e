"""What a step that is left out must not leave behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mpp
from mpp.metrics import read_metrics
from mpp.nonfinite import KEPT, Statistics
from tests.conftest import pretrain_recipe

DIVERGES = {"optim.base_lr": 1e20, "optim.warmup_steps": 0, "max_skipped_steps": 50}


def test_statistics_of_batch_norms_are_what_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model(torch.randn(2, 3, 5, 5))
    before = {name: value.clone() for name, value in model.named_buffers()}
    statistics = Statistics(model, needed=True)
    statistics.remember()
    model(torch.full((2, 3, 5, 5), torch.nan))
    assert not all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    statistics.put_back()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.filterwarnings("ignore::mpp.errors.MppWarning")
def test_a_step_that_is_left_out_moves_nothing_and_the_last_few_are_kept(shards: Path, tmp_path: Path) -> None:
    """The learning average of the encoder, whose weights stay, would go on to come closer to these."""
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
