"""Judge a model on labeled images. All processes share the work, and each image counts once."""

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
    """Metrics of a model on some images."""

    metrics: dict[str, float]
    per_class: list[float | None] | None
    """Headline metric of each class, None for a class without one. None as a whole if the task has no such metric, or
    only the headline was requested."""
    unreadable: int
    """Number of images that could not be read."""
    unreadable_lines: list[str]
    """A line for each unreadable image."""
    unread_classes: list[str]
    """Classes that have images, but no readable image. Empty unless each image has one class."""


def judge(
    recipe: FinetuneRecipe,
    team: Team,
    kind: LabelKind,
    model: Supervised,
    images: LabeledImages,
    chosen: np.ndarray,
    key: str,
    *,
    views: int,
    headline_only: bool = False,
) -> Judged:
    """Judge a model, and leave it in eval mode.

    Args:
        recipe: Recipe of the approach.
        team: Processes of the run. Every one of them calls this.
        kind: Kind of label.
        model: Model to judge. Its buffers, such as batch norm statistics, become those of the main process, which
            exports the model.
        images: Labeled images.
        chosen: Numbers of the images to judge on.
        key: Name of the images in messages, such as data.val.
        views: Number of views of each image whose predictions are averaged, see data.val_views.
        headline_only: Whether to compute only the task's headline metric.

    Raises:
        UserError: If no image can be read, or if no image has a label to judge by.
    """
    team.copy_from_main(model.buffers())
    numbers = chosen[team.rank :: team.world].tolist()
    size = min(kind.judged_at_once, recipe.optim.max_batch_per_device)
    parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    dataset = kind.judging_set(images, views)
    independent = kind.independent_classes

    def outputs_of(x: torch.Tensor) -> Any:
        if views == 1:
            return model.run(x)
        crops = x if x.ndim == 5 else x.unsqueeze(1)
        probabilities = over_views(model.run, crops, mirrored=True, independent=independent)
        return probabilities.logit(1e-7) if independent else probabilities.log()  # because metrics take logits

    judged: list[object] = []
    read, unreadable_lines = list[int](), list[str]()
    model.eval()
    with torch.no_grad(), team.autocast():
        for batch in batches(dataset, parts, workers=recipe.data.workers, pin_memory=False):
            read += batch.positions[batch.readable].tolist()
            unreadable_lines += batch.bad
            if batch.readable.any():
                x, labels = kind.readable_part(batch)
                judged.append(model.task.judge(outputs_of, x, labels, recipe.data.image_size))
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
