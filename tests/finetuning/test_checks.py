"""Doubts that are reported before fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpp.finetuning.checks import doubt_teacher
from mpp.recipe.finetune import FinetuneRecipe
from tests.finetuning.test_finetuning import recipe as finetune_recipe


def recipe(teacher: str | None, seeds: list[int], **data: Any) -> FinetuneRecipe:
    keys = {f"data.{key}": value for key, value in ({"labels_per_class": None} | data).items()}
    return finetune_recipe(
        Path("shards"), Path("runs/x"), "runs/p", seeds=seeds, distill={"teacher": teacher} if teacher else None, **keys
    )


@pytest.mark.parametrize("teacher", ["runs/f/pretrained-seed0", "runs/f/labels25-pretrained-seed0/encoder"])
@pytest.mark.parametrize("drawn", [{"labels_per_class": 25}, {"fraction": 0.5}])
def test_a_teacher_of_another_seed_knows_other_labels(teacher: str, drawn: dict[str, Any]) -> None:
    (line,) = doubt_teacher(recipe(teacher, [0, 1, 2], **drawn))
    assert line.startswith(
        f"distill.teacher: {teacher} learned from the labels that seed 0 draws; seed 1, 2 draws others"
    )
    assert line.endswith("give seeds=[0]")


def test_each_teacher_is_doubted_on_its_own() -> None:
    teachers: Any = ["runs/f/pretrained-seed0", "runs/f/cnn-seed1"]
    lines = doubt_teacher(recipe(teachers, [1], labels_per_class=25))
    assert [line.split()[1] for line in lines] == ["runs/f/pretrained-seed0"]


def test_other_teachers_are_not_doubted() -> None:
    assert doubt_teacher(recipe("runs/f/pretrained-seed0", [0, 1])) == [], (
        "if all labels are used, all seeds have the same"
    )
    assert doubt_teacher(recipe("runs/f/pretrained-seed0", [0], labels_per_class=25)) == []
    assert doubt_teacher(recipe("exports/teacher", [0, 1], labels_per_class=25)) == []
    assert doubt_teacher(recipe(None, [0, 1], labels_per_class=25)) == []
