"""Open the unlabeled images of a fine-tuning run, without those that are also validation images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mpp.data.crop import Crop
from mpp.data.leak import find_shared
from mpp.data.loader import KeyedDataset
from mpp.data.order import Order
from mpp.data.readers import LabeledImages, PackedReader
from mpp.data.shards.reader import ShardImages, evenly
from mpp.data.unlabeled_sets import UnlabeledDataset, WithUnlabeled
from mpp.errors import BadImage, UserError
from mpp.finetuning.augment import make_augmentation
from mpp.parallel.team import Team
from mpp.recipe.finetune import FinetuneRecipe

LOOKED_AT = 16
"""Most images that are opened as a check before training."""


@dataclass(frozen=True)
class UnlabeledImages:
    """Images without labels."""

    images: ShardImages
    rows: tuple[np.ndarray, ...]
    """For each shard, the rows (n,) of the images whose bytes differ from those of all validation images."""

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    @property
    def left_out(self) -> int:
        """Return the number of images that are left out because they are validation images."""
        return sum(self.images.counts) - len(self)


def unlabeled_per_label(recipe: FinetuneRecipe) -> int:
    """Return the number of unlabeled images for each labeled image of a batch."""
    if recipe.unlabeled:
        return recipe.unlabeled.per_label
    return recipe.distill.per_label if recipe.distill and recipe.distill.images else 0


def first_unlabeled_step(recipe: FinetuneRecipe, total_steps: int) -> int:
    """Return the first step of a trial that has unlabeled images, counted from 0."""
    return min(round(recipe.unlabeled.start * total_steps), total_steps - 1) if recipe.unlabeled else 0


def open_unlabeled(recipe: FinetuneRecipe, team: Team, val: LabeledImages) -> UnlabeledImages | None:
    """Open the images of `unlabeled` or `distill`. Return None if the recipe has none. Every process calls this.

    Raises:
        UserError: If the images cannot be read, or if all of them are validation images.
    """
    if recipe.unlabeled:
        places, key = recipe.unlabeled.images, "unlabeled.images"
        _strong_view(recipe)  # raises a UserError if timm does not know the policy
    elif recipe.distill and recipe.distill.images:
        places, key = recipe.distill.images, "distill.images"
    else:
        return None
    images = ShardImages(places, key=key, **recipe.data.opening())
    reader = PackedReader(images)
    shown = np.ones(sum(images.counts), dtype=bool)
    shown[team.on_main(partial(find_shared, reader, val.reader))] = False  # only the main process compares images
    rows = tuple(np.flatnonzero(of_shard) for of_shard in np.split(shown, np.cumsum(images.counts)[:-1]))
    opened = UnlabeledImages(images, rows)
    if not len(opened):
        raise UserError(f"{key}: all of these images are also validation images")
    _look_at_some(reader, np.flatnonzero(shown), recipe, key)
    return opened


def _look_at_some(reader: PackedReader, chosen: np.ndarray, recipe: FinetuneRecipe, key: str) -> None:
    """Check before training that at least one of some images can be read.

    Raises:
        UserError: If none of these images can be read.
    """
    crop = Crop(recipe.data.image_size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, **recipe.data.decoding())
    reasons = []
    for at in evenly(len(chosen), LOOKED_AT):
        try:
            crop.centre(reader.read(int(chosen[at])))
            return
        except BadImage as error:
            reasons.append(f"{reader.name(int(chosen[at]))}: {error}")
    raise UserError(f"{key}: not one of {len(reasons)} images looked at can be read; the first: {reasons[0]}")


def add_unlabeled(
    labeled: KeyedDataset, opened: UnlabeledImages, recipe: FinetuneRecipe, seed: int, total_steps: int
) -> WithUnlabeled:
    """Return a dataset whose batches also contain unlabeled images.

    Args:
        labeled: Dataset of labeled images.
        opened: Unlabeled images.
        recipe: Recipe of the trial's approach.
        seed: Seed of the trial.
        total_steps: Number of steps of the trial.

    Raises:
        UserError: If timm does not know the policy of the strong view.
    """
    data = recipe.data
    decoding = data.decoding()
    weak, per_label = None, unlabeled_per_label(recipe)
    if recipe.unlabeled:
        scale = recipe.unlabeled.weak_crop_scale
        weak = Crop(data.image_size, scale=scale, ratio=data.crop_ratio, flip=data.flip, **decoding)
    strong = _strong_view(recipe)
    unlabeled = UnlabeledDataset(opened.images, opened.rows, strong, weak, data.image_size, seed, **decoding)
    counts = [len(rows) for rows in opened.rows]
    batch_size = recipe.optim.global_batch_size
    order = Order(counts, global_batch=per_label * batch_size, seed=seed)
    start = first_unlabeled_step(recipe, total_steps) * batch_size
    return WithUnlabeled(labeled, unlabeled, order, per_label, start=start)


def _strong_view(recipe: FinetuneRecipe) -> Callable[..., Any]:
    """Return the augmentation of unlabeled images: that of `unlabeled`, or for a teacher that of labeled images."""
    if recipe.unlabeled is None:
        return make_augmentation(recipe.data)
    data = recipe.data.model_copy(update={"auto_augment": recipe.unlabeled.auto_augment})
    return make_augmentation(data, key="unlabeled.auto_augment")
