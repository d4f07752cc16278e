"""The minutes trained before a run: each earlier run counts once, however the models are related."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpp.finetuning.minutes_before import minutes_before
from mpp.recipe.finetune import FinetuneRecipe
from tests.finetuning.test_finetuning import recipe as finetune_recipe


def recipe(encoder: Path | str, teacher: Path | None = None) -> FinetuneRecipe:
    changes: dict[str, Any] = {"distill.teacher": str(teacher)} if teacher else {}
    if encoder == "scratch":
        changes["architecture.name"] = "vit_tiny_patch16_224"
    return finetune_recipe(Path("shards"), Path("runs/x"), encoder, **changes)


def pretrained(folder: Path, minutes: float, began_with: str = "vit_tiny_patch16_224") -> Path:
    """Write the parts of a pretraining run that its minutes depend on."""
    folder.mkdir()
    of_run = {"out": str(folder), "data": {"shards": "s", "image_size": 32}, "optim": {"epochs": 1}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(of_run | {"encoder": {"name": began_with}}))
    write_metrics(folder, minutes)
    return folder


def exported(folder: Path, minutes: float) -> Path:
    """Write an export of a pretraining run."""
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "export.json").write_text(json.dumps({"metrics": {"cpu_minutes": minutes}}))
    return folder


def write_metrics(folder: Path, minutes: float) -> None:
    lines = [{"step": 1, "cpu_minutes": minutes / 2}, {"step": 2, "cpu_minutes": minutes}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def finetuned(out: Path, minutes: float, of: FinetuneRecipe, trial: str = "pretrained-seed0") -> Path:
    """Write a trial of a fine-tuning run."""
    (out / trial).mkdir(parents=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(of.model_dump(mode="json", exclude_unset=True)))
    write_metrics(out / trial, minutes)
    return out / trial


def test_each_run_counts_once(tmp_path: Path) -> None:
    encoder = pretrained(tmp_path / "p", 11.0)
    assert minutes_before(recipe(encoder), "pretrained", "CPU") == 11
    first = finetuned(tmp_path / "f", 6.0, recipe(encoder))
    assert minutes_before(recipe(first), "pretrained", "CPU") == 17, "it was fine-tuned twice"
    taught = recipe(encoder, teacher=first)
    assert minutes_before(taught, "pretrained", "CPU") == 17, "encoder and teacher share one pretraining"
    second = finetuned(tmp_path / "g", 20.0, taught)
    assert minutes_before(recipe(encoder, teacher=second), "pretrained", "CPU") == 37
    assert minutes_before(recipe(encoder, teacher=second), "scratch", "CPU") == 37, "its teacher's minutes count"
    assert minutes_before(recipe(encoder, teacher=second), "cnn", "CPU") == 0, "it has no teacher"
    (second / "encoder").mkdir()
    assert minutes_before(recipe(encoder, teacher=second / "encoder"), "pretrained", "CPU") == 37, (
        "a trial may be named by its encoder folder, as in logs"
    )


def test_pretraining_that_went_on_counts_what_it_began_with(tmp_path: Path) -> None:
    first = pretrained(tmp_path / "first", 11.0)
    second = pretrained(tmp_path / "second", 5.0, began_with=str(first))
    assert minutes_before(recipe(second), "pretrained", "CPU") == 16
    (first / "encoder").mkdir()
    again = pretrained(tmp_path / "again", 5.0, began_with=str(first / "encoder"))
    assert minutes_before(recipe(again), "pretrained", "CPU") == 16, "the encoder folder of a run stands for the run"
    export = exported(tmp_path / "export", 7.0)
    assert minutes_before(recipe(export), "pretrained", "CPU") == 7
    third = pretrained(tmp_path / "third", 5.0, began_with=str(export))
    assert minutes_before(recipe(third), "pretrained", "CPU") == 5, (
        "an export that pretraining began with does not count"
    )


@pytest.mark.parametrize("trial", ["scratch-seed0", "labels5-scratch-seed0", "cnn-seed3"])
def test_a_teacher_from_scratch_has_no_pretraining(trial: str, tmp_path: Path) -> None:
    encoder = pretrained(tmp_path / "p", 11.0)
    teacher = finetuned(tmp_path / "f", 6.0, recipe(encoder), trial)
    assert minutes_before(recipe("scratch", teacher), "scratch", "CPU") == 6


def test_what_is_not_known_is_none(tmp_path: Path) -> None:
    encoder = pretrained(tmp_path / "p", 11.0)
    assert minutes_before(recipe(encoder), "pretrained", "GPU") is None
    assert minutes_before(recipe("vit_tiny_patch16_224"), "pretrained", "CPU") is None, (
        "nothing is recorded of timm's weights"
    )
    assert minutes_before(recipe(tmp_path / "missing"), "pretrained", "CPU") is None
    assert minutes_before(recipe(encoder), "published", "CPU") is None
    cut_off = finetuned(tmp_path / "f", 6.0, recipe(encoder))
    (cut_off / "metrics.jsonl").unlink()
    assert minutes_before(recipe(encoder, cut_off), "pretrained", "CPU") is None
