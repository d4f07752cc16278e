"""Find the kind of label that a recipe's task learns from."""

from __future__ import annotations

from mpp.finetuning.label_kind import LabelKind
from mpp.recipe import registry
from mpp.recipe.finetune import FinetuneRecipe


def open_label_kind(recipe: FinetuneRecipe) -> LabelKind:
    """Return the kind of label that the recipe's task names."""
    task = registry.component("task", recipe.task.name)
    kind: LabelKind = registry.component("labels", task.labels)(recipe.data, recipe.task)
    return kind
