"""Open the images without labels of a fine-tune, and leave out those that it is judged by."""

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
"""Images that are opened before anything is trained."""


@dataclass(frozen=True)
class UnlabeledImages:
    """Images without labels."""

    images: ShardImages
    rows: tuple[np.ndarray, ...]
    """(n,) of each shard: rows of the images that are not among the validation images, byte by byte."""

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    @property
    def left_out(self) -> int:
        """Images that are among the validation images."""
        return sum(self.images.counts) - len(self)


def unlabeled_per_label(recipe: FinetuneRecipe) -> int:
    """Return how many images without labels a labeled one brings along in a step."""
    if recipe.unlabeled:
        return recipe.unlabeled.per_label
    return recipe.distill.per_label if recipe.distill and recipe.distill.images else 0


def open_unlabeled(recipe: FinetuneRecipe, team: Team, val: LabeledImages) -> UnlabeledImages | None:
    """Open the images of `unlabeled` or `distill`; None where the recipe has none. Every process calls this.

    Raises:
        UserError: They cannot be read, or none is left without the validation images.
    """
    if recipe.unlabeled:
        places, key = recipe.unlabeled.images, "unlabeled.images"
        _strong_view(recipe)  # refuses a policy that timm does not know
    elif recipe.distill and recipe.distill.images:
        places, key = recipe.distill.images, "distill.images"
    else:
        return None
    images = ShardImages(places, key=key, **recipe.data.opening())
    reader = PackedReader(images)
    shown = np.ones(sum(images.counts), dtype=bool)
    shown[team.on_main(partial(find_shared, reader, val.reader))] = False  # one process reads for all
    rows = tuple(np.flatnonzero(of_shard) for of_shard in np.split(shown, np.cumsum(images.counts)[:-1]))
    opened = UnlabeledImages(images, rows)
    if not len(opened):
        raise UserError(f"{key}: every one of them is a validation image, too")
    _look_at_some(reader, np.flatnonzero(shown), recipe, key)
    return opened


def _look_at_some(reader: PackedReader, chosen: np.ndarray, recipe: FinetuneRecipe, key: str) -> None:
    """Open some images, so that a place of unreadable ones is refused before anything is trained.

    Raises:
        UserError: Not one of them can be read.
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


def add_unlabeled(labeled: KeyedDataset, opened: UnlabeledImages, recipe: FinetuneRecipe, seed: int) -> WithUnlabeled:
    """Return a dataset whose batches also bring images without labels.

    Args:
        labeled: Images with labels.
        opened: Those without.
        recipe: Of the trial's approach.
        seed: Of the trial.

    Raises:
        UserError: timm does not know the policy of the strong view.
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
    order = Order(counts, global_batch=per_label * recipe.optim.global_batch_size, seed=seed)
    return WithUnlabeled(labeled, unlabeled, order, per_label)


def _strong_view(recipe: FinetuneRecipe) -> Callable[..., Any]:
    """How images without labels are augmented: by a policy of their own, or as a teacher sees labeled ones."""
    if recipe.unlabeled is None:
        return make_augmentation(recipe.data)
    data = recipe.data.model_copy(update={"auto_augment": recipe.unlabeled.auto_augment})
    return make_augmentation(data, key="unlabeled.auto_augment")
