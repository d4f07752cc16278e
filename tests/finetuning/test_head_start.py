"""A head that begins as a linear probe of the frozen encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import mpp
from mpp.errors import UserError
from mpp.finetuning import head_start, loop
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import check_recipe
from tests.finetuning.test_finetuning import values


def recipe(shards: Path, out: Path, encoder: Path | str, **changes: Any) -> FinetuneRecipe:
    small = {"seeds": [0], "head_init": "probe", "optim.steps": 2, "optim.base_lr": 1e-9}
    return check_recipe(values(shards, out, encoder, **small | changes), FinetuneRecipe)


def test_it_begins_as_scikit_learns_probe(
    shards: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one weight decay, so nothing is chosen. Steps at a learning rate near 0 leave the head as it was."""
    decay, read = 0.1, list[tuple[np.ndarray, np.ndarray, np.ndarray]]()
    real = head_start._read_features
    monkeypatch.setattr(head_start, "WEIGHT_DECAYS", (decay,))
    monkeypatch.setattr(head_start, "_read_features", lambda *of: read.extend(real(*of)) or read[-1:])
    judge, views = loop.judge, list[int]()
    monkeypatch.setattr(loop, "judge", lambda *of, **how: views.append(how["views"]) or judge(*of, **how))
    result = mpp.finetune(recipe(shards, tmp_path / "run", run, **{"data.val_views": 2}))
    assert views == [2, 2, 2], "the start must be judged as the two ends are"
    (_, features, labels), trial = read[0], tmp_path / "run" / "pretrained-seed0"
    assert len(read) == 1, "from scratch, there is nothing to probe"
    assert features.shape == (20, 32)
    scaled = (features - features.mean(0)) / features.std(0)
    # with two classes, scikit-learn decays one difference of weights, and softmax decays both weights
    theirs = LogisticRegression(C=2 / (len(labels) * decay), tol=1e-8, max_iter=10_000).fit(scaled, labels)
    model = mpp.load_encoder(trial).eval()
    ours = model.get_classifier()(torch.from_numpy(features)).softmax(-1)
    np.testing.assert_allclose(ours.detach().numpy(), theirs.predict_proba(scaled), atol=2e-3)

    metrics = json.loads((trial / "result.json").read_text())["metrics"]
    assert metrics["start_accuracy"] == metrics["accuracy"], "steps at a learning rate near 0 must change nothing"
    assert (
        "start_accuracy" not in json.loads((tmp_path / "run" / "scratch-seed0" / "result.json").read_text())["metrics"]
    )
    assert "probe" in result.table()
    assert "fine-tuning lost" not in result.table()


def test_a_fine_tune_below_its_own_start_is_named(
    shards: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "judge_start", lambda job: 1.0)
    result = mpp.finetune(
        recipe(shards, tmp_path / "run", run, beside=[], **{"optim.base_lr": 10.0, "optim.steps": 20})
    )
    assert "probe        100.0 %   (its start; fine-tuning lost against it: lower optim.base_lr)" in result.table()


def test_what_it_is_not_for(shards: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="head_init: probe: requires a head of one linear layer; use head_init=zero"):
        mpp.finetune(recipe(shards, tmp_path / "run", run, **{"task.tanh_dim": 8}))
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        UserError, match="pool: attention: learns from the first step on; not with frozen, lora or head_init"
    ):
        recipe(shards, tmp_path / "other", run, pool="attention")
    with pytest.raises(UserError, match="head_init: not with task: segment"):
        recipe(shards, tmp_path / "other", run, task="segment", **{"data.labels_per_class": None})
