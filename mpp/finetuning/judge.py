"""Judge a model on labeled images, each counted once, shared by all processes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from mpp.data.loader import batches
from mpp.data.readers import LabeledImages
from mpp.data.unreadable import unread_classes
from mpp.errors import UserError
from mpp.finetuning.label_kind import LabelKind
from mpp.finetuning.model import Supervised, over_views
from mpp.parallel.team import Team
from mpp.recipe.finetune import FinetuneRecipe


class Judged(NamedTuple):
    """What a model is worth on some images."""

    metrics: dict[str, float]
    per_class: list[float | None] | None
    """The headline metric of each class, None where it has none; of tasks that have it so."""
    unreadable: int
    unreadable_lines: list[str]
    """A line for each of them."""
    unread_classes: list[str]
    """Classes that have images, of which not one could be read; of tasks with one label an image."""


def judge(
    recipe: FinetuneRecipe,
    team: Team,
    kind: LabelKind,
    model: Supervised,
    images: LabeledImages,
    chosen: np.ndarray,
    key: str,
    *,
    headline_only: bool = False,
) -> Judged:
    """Judge a model, and leave it in eval mode.

    Args:
        recipe: Of the run.
        team: The processes; every one of them calls this.
        kind: The kind of label.
        model: Whose batch norms' statistics become those of the main process, which is exported.
        images: Labeled images.
        chosen: Numbers of those to judge on.
        key: What the images are called in messages.
        headline_only: The task's headline metric is enough, from one view of each image.

    Raises:
        UserError: Not one image can be read, or none has a label to judge by.
    """
    team.copy_from_main(model.buffers())
    numbers = chosen[team.rank :: team.world].tolist()
    size = min(kind.judged_at_once, recipe.optim.max_batch_per_device)
    parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    views = 1 if headline_only else recipe.data.val_views  # those on the way are many
    dataset = kind.judging_set(images, views)
    independent = kind.independent_classes

    def run(x: torch.Tensor) -> Any:
        if views == 1:
            return model.run(x)
        crops = x if x.ndim == 5 else x.unsqueeze(1)
        probabilities = over_views(model.run, crops, mirrored=True, independent=independent)
        return probabilities.logit(1e-7) if independent else probabilities.log()  # metrics take logits

    judged: list[object] = []
    read, unreadable_lines = list[int](), list[str]()
    model.eval()
    with torch.no_grad(), team.autocast():
        for batch in batches(dataset, parts, workers=recipe.data.workers, pin_memory=False):
            read += batch.positions[batch.readable].tolist()
            unreadable_lines += batch.bad
            if batch.readable.any():
                x, labels = kind.readable_part(batch)
                judged.append(model.task.judge(run, x, labels, recipe.data.image_size))
    judged, read, lines = team.gather(judged), team.gather(read), team.gather(unreadable_lines)
    if not judged:
        raise UserError(f"{key}: not one image can be read; the first: {lines[0]}")
    metrics = model.task.metrics(judged, headline_only=headline_only)
    if math.isnan(metrics[model.task.headline]):
        raise UserError(f"{key}: none of these images has a label to judge by")
    per_class = None if headline_only else model.task.per_class(judged)
    each = None if per_class is None else [None if math.isnan(v) else v for v in per_class.tolist()]
    lost = unread_classes(images, read, chosen.tolist())
    return Judged(metrics, each, len(chosen) - len(read), lines, lost)
