"""What is doubted before a fine-tune."""

from __future__ import annotations

from typing import Any

import pytest

from mpp.finetuning.checks import doubt_teacher
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import check_recipe


def recipe(teacher: str | None, seeds: list[int], **data: Any) -> FinetuneRecipe:
    values: dict[str, Any] = {"job": "finetune", "encoder": "runs/p", "out": "runs/x", "seeds": seeds}
    values["data"] = {"train": "labeled/train", "val": "labeled/val", "image_size": 32, **data}
    values["optim"] = {"base_lr": 1e-3, "global_batch_size": 8, "steps": 2}
    return check_recipe(values | ({"distill": {"teacher": teacher}} if teacher else {}), FinetuneRecipe)


@pytest.mark.parametrize("teacher", ["runs/f/pretrained-seed0", "runs/f/labels25-pretrained-seed0/encoder"])
@pytest.mark.parametrize("drawn", [{"labels_per_class": 25}, {"fraction": 0.5}])
def test_a_teacher_of_another_seed_knows_other_labels(teacher: str, drawn: dict[str, Any]) -> None:
    (line,) = doubt_teacher(recipe(teacher, [0, 1, 2], **drawn))
    assert line.startswith(
        f"distill.teacher: {teacher} learned from the labels that seed 0 draws; seed 1, 2 draws others"
    )
    assert line.endswith("give seeds=[0]")


def test_other_teachers_are_not_doubted() -> None:
    assert doubt_teacher(recipe("runs/f/pretrained-seed0", [0, 1])) == [], "all labels are the same for all"
    assert doubt_teacher(recipe("runs/f/pretrained-seed0", [0], labels_per_class=25)) == []
    assert doubt_teacher(recipe("exports/teacher", [0, 1], labels_per_class=25)) == []
    assert doubt_teacher(recipe(None, [0, 1], labels_per_class=25)) == []
