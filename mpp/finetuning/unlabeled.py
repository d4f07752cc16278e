"""Open the images without labels of a fine-tune, and leave out those that it is judged by."""

from __future__ import annotations

from dataclasses import dataclass

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


def open_unlabeled(recipe: FinetuneRecipe, val: LabeledImages) -> UnlabeledImages | None:
    """Open the images of `unlabeled`; None where the recipe has none.

    Raises:
        UserError: They cannot be read, or none is left without the validation images.
    """
    if recipe.unlabeled is None:
        return None
    images = ShardImages(recipe.unlabeled.images, key="unlabeled.images", **recipe.data.opening())
    reader = PackedReader(images)
    opened = UnlabeledImages(images, frozenset(reader.at(i) for i in find_shared(reader, val.reader)))
    if not len(opened):
        raise UserError("unlabeled.images: every one of them is a validation image, too")
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
    keys, data = recipe.unlabeled, recipe.data
    assert keys is not None
    decoding = data.decoding()
    weak = Crop(data.image_size, scale=keys.weak_crop_scale, ratio=data.crop_ratio, flip=data.flip, **decoding)
    strong = make_augmentation(data.model_copy(update={"auto_augment": keys.auto_augment}))
    unlabeled = UnlabeledDataset(opened.images, opened.left_out, weak, strong, seed, **decoding)
    order = Order(opened.images.counts, global_batch=keys.per_label * recipe.optim.global_batch_size, seed=seed)
    return WithUnlabeled(labeled, unlabeled, order, keys.per_label)
