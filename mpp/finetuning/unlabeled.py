"""Open the images without labels of a fine-tune, and leave out those that it is judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpp.data.crop import Crop
from mpp.data.leak import find_shared
from mpp.data.loader import KeyedDataset
from mpp.data.order import Order
from mpp.data.readers import LabeledImages, PackedReader
from mpp.data.shards.reader import ShardImages
from mpp.data.unlabeled_sets import UnlabeledDataset, WithUnlabeled
from mpp.errors import UserError
from mpp.finetuning.augment import make_augmentation
from mpp.recipe.finetune import FinetuneRecipe


@dataclass(frozen=True)
class UnlabeledImages:
    """Images without labels."""

    images: ShardImages
    left_out: frozenset[tuple[int, int]]
    """(shard, row) of those that are among the validation images, byte by byte."""

    def __len__(self) -> int:
        return sum(self.images.counts) - len(self.left_out)


def unlabeled_per_label(recipe: FinetuneRecipe) -> int:
    """Return how many images without labels a labeled one brings along in a step."""
    if recipe.unlabeled:
        return recipe.unlabeled.per_label
    return recipe.distill.per_label if recipe.distill and recipe.distill.images else 0


def open_unlabeled(recipe: FinetuneRecipe, val: LabeledImages) -> UnlabeledImages | None:
    """Open the images of `unlabeled` or `distill`; None where the recipe has none.

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
    opened = UnlabeledImages(images, frozenset(reader.at(i) for i in find_shared(reader, val.reader)))
    if not len(opened):
        raise UserError(f"{key}: every one of them is a validation image, too")
    return opened


def add_unlabeled(labeled: KeyedDataset, opened: UnlabeledImages, recipe: FinetuneRecipe, seed: int) -> WithUnlabeled:
    """Return a dataset whose batches bring images without labels, too.

    Args:
        labeled: Images with labels.
        opened: Those without.
        recipe: Of the cell's arm.
        seed: Of the cell.

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
    unlabeled = UnlabeledDataset(opened.images, opened.left_out, strong, weak, data.image_size, seed, **decoding)
    order = Order(opened.images.counts, global_batch=per_label * recipe.optim.global_batch_size, seed=seed)
    return WithUnlabeled(labeled, unlabeled, order, per_label)


def _strong_view(recipe: FinetuneRecipe) -> Callable[..., Any]:
    """How images without labels are augmented: by a policy of their own, or as a teacher sees labeled ones."""
    if recipe.unlabeled is None:
        return make_augmentation(recipe.data)
    data = recipe.data.model_copy(update={"auto_augment": recipe.unlabeled.auto_augment})
    return make_augmentation(data, key="unlabeled.auto_augment")
