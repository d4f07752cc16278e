"""Unlabeled images that accompany labeled ones: one or two views of each, drawn only from (seed, position)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mpp.data.crop import Crop
from mpp.data.decoding.decode import GREY
from mpp.data.labeled_sets import LabeledBatch, augment_image
from mpp.data.loader import KeyedDataset
from mpp.data.order import Order
from mpp.data.shards.reader import REPLACEMENTS, ShardImages
from mpp.errors import BadImage, UserError
from mpp.recipe.sections import Decoding
from mpp.rng import Purpose, stream


@dataclass
class UnlabeledViews:
    """Views of the images of a micro-batch, and the record of unreadable images."""

    strong: Tensor
    """(B, C, H, W) uint8, or float32 in [0, 255] for images with a value range."""
    weak: Tensor | None
    """(B, C, H, W), in the type of `strong`. None if weak views are not requested."""
    replaced: int
    bad: list[str]


class UnlabeledDataset(Dataset[UnlabeledViews]):
    """Views of images. Keys are (position, shard, place in `rows`).

    A bad image is replaced by the next one of its shard.

    Args:
        images: Images in shards or folders.
        rows: (n,) for each shard: rows of the images to use. Validation images are not among them.
        strong: Augmentation of the view that the model learns from, see `augment` of `LabeledDataset`.
        weak: Crop of the view for which a teacher predicts. None means no weak view.
        size: (H, W) of the views.
        seed: Seed of the run.
        **decoding: Decoding settings, see `decode_cut`.
    """

    def __init__(
        self,
        images: ShardImages,
        rows: Sequence[np.ndarray],
        strong: Callable[..., Tensor],
        weak: Crop | None,
        size: tuple[int, int],
        seed: int,
        **decoding: Unpack[Decoding],
    ) -> None:
        self.images, self.rows, self.strong, self.weak = images, rows, strong, weak
        self.size, self.seed, self.decoding = size, seed, decoding

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> UnlabeledViews:
        views, lines = zip(*(self._views(*key) for key in keys), strict=True)
        strong = torch.stack([of_one[0] for of_one in views])
        weak = torch.stack([of_one[1] for of_one in views]) if self.weak else None
        return UnlabeledViews(strong, weak, sum(map(bool, lines)), [line for of_one in lines for line in of_one])

    def _views(self, position: int, shard: int, place: int) -> tuple[list[Tensor], list[str]]:
        """Return the strong and the weak view, and a line for each unreadable image that this image replaces."""
        bad: list[str] = []
        rows = self.rows[shard]
        for step in range(min(REPLACEMENTS, len(rows))):
            row = int(rows[(place + step) % len(rows)])
            try:
                return self._augment(self.images.read(shard, row), position), bad
            except BadImage as error:
                bad.append(f"{self.images.name(shard, row)}: {error}")
        dtype = torch.float32 if "value_range" in self.decoding else torch.uint8
        grey = torch.full((self.decoding["channels"], *self.size), GREY, dtype=dtype)
        return [grey, grey], bad

    def _augment(self, data: bytes, position: int) -> list[Tensor]:
        """Return the strong view, and the weak view if it is requested."""
        strong = augment_image(data, self.strong, self.seed, Purpose.STRONG, position, self.decoding)
        return [strong, self.weak.random(data, stream(self.seed, Purpose.WEAK, position))] if self.weak else [strong]


class WithUnlabeled(Dataset[LabeledBatch]):
    """Labeled images, each with some unlabeled images. Keys are those of the labeled images.

    The labeled image at position p comes with the `per_label` unlabeled images from position p · per_label on. This
    depends only on the position, not on the number of processes, micro-batches and workers.

    Args:
        labeled: Dataset of the labeled images.
        unlabeled: Dataset of the unlabeled images.
        order: Order of the unlabeled images. Its global batch is `per_label` times that of the labeled images.
        per_label: Number of unlabeled images for each labeled image.
        start: The first position with unlabeled images. Before it, labeled images come alone.
    """

    def __init__(
        self, labeled: KeyedDataset, unlabeled: UnlabeledDataset, order: Order, per_label: int, *, start: int = 0
    ) -> None:
        self.labeled, self.unlabeled, self.order, self.per_label = labeled, unlabeled, order, per_label
        self.start = start

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> LabeledBatch | UserError:
        batch: Any = self.labeled.__getitems__(keys)
        if isinstance(batch, UserError) or keys[0][0] < self.start:
            return batch
        step, slot = divmod(keys[0][0] * self.per_label, self.order.global_batch)
        try:
            views = self.unlabeled.__getitems__(
                self.order.at(step * self.order.global_batch, slot, len(keys) * self.per_label)
            )
        except UserError as error:
            return error
        batch.strong, batch.weak = views.strong, views.weak
        batch.replaced += views.replaced
        batch.bad = [*batch.bad, *views.bad]
        return batch
