"""Images without labels beside labeled ones: a weak and a strong view of each, drawn from (seed, position) alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mpp.data.crop import Crop
from mpp.data.decoding.decode import GREY, decode_pillow
from mpp.data.labeled_sets import LabeledBatch
from mpp.data.loader import KeyedDataset
from mpp.data.order import Order
from mpp.data.shards.reader import REPLACEMENTS, ShardImages
from mpp.errors import BadImage, UserError
from mpp.recipe.sections import Decoding, Reading
from mpp.rng import Purpose, stream, torch_seed


@dataclass
class UnlabeledViews:
    """Two views of each image of a micro-batch, and what could not be read."""

    weak: Tensor
    """(B, C, H, W) uint8"""
    strong: Tensor
    """(B, C, H, W) uint8"""
    replaced: int
    bad: list[str]


class UnlabeledDataset(Dataset[UnlabeledViews]):
    """Two views of images; keys are (position, shard, row). A bad image is replaced by the next of its shard.

    Args:
        images: Of the shards or folders.
        left_out: (shard, row) of images that are never shown: those that judge.
        weak: How the view is cropped from which an averaged model says what it sees.
        strong: PIL image -> (C, H, W) uint8, as `augment` of `LabeledDataset`: the view that learns it.
        seed: Of the run.
        **decoding: As of `decode_cut`.
    """

    def __init__(
        self,
        images: ShardImages,
        left_out: frozenset[tuple[int, int]],
        weak: Crop,
        strong: Callable[..., Tensor],
        seed: int,
        **decoding: Unpack[Decoding],
    ) -> None:
        self.images, self.left_out, self.weak, self.strong = images, left_out, weak, strong
        self.seed, self.decoding = seed, decoding

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> UnlabeledViews:
        views, lines = zip(*(self._views(*key) for key in keys), strict=True)
        weak, strong = (torch.stack(each) for each in zip(*views, strict=True))
        return UnlabeledViews(weak, strong, sum(map(bool, lines)), [line for of_one in lines for line in of_one])

    def _views(self, position: int, shard: int, row: int) -> tuple[tuple[Tensor, Tensor], list[str]]:
        """The two views, and a line for each unreadable image in whose place this one stands."""
        bad: list[str] = []
        rows, tried = self.images.counts[shard], 0
        for at in ((row + step) % rows for step in range(rows)):
            if (shard, at) in self.left_out:
                continue
            if tried == REPLACEMENTS:
                break
            tried += 1
            try:
                return self._both(self.images.read(shard, at), position), bad
            except BadImage as error:
                bad.append(f"{self.images.name(shard, at)}: {error}")
        grey = torch.full((self.weak.channels, *self.weak.size), GREY).to(self.weak.dtype)
        return (grey, grey), bad

    def _both(self, data: bytes, position: int) -> tuple[Tensor, Tensor]:
        weak = self.weak.random(data, stream(self.seed, Purpose.WEAK, position))
        if "value_range" in self.decoding:
            return weak, self.strong(data, stream(self.seed, Purpose.STRONG, position))
        reading: Reading = self.decoding
        image = decode_pillow(data, **reading)
        seed = torch_seed(self.seed, Purpose.STRONG, position)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        return weak, torch.as_tensor(self.strong(image))


class WithUnlabeled(Dataset[LabeledBatch]):
    """Labeled images, and to each of them some without labels. Keys are those of the labeled images.

    The image at position p of the run brings the unlabeled ones at p · per_label and after: a pure function of the
    position, whatever the processes, micro-batches and workers are.

    Args:
        labeled: The labeled images.
        unlabeled: The others.
        order: Of the others; its global batch is `per_label` times that of the labeled ones.
        per_label: Unlabeled images to a labeled one.
    """

    def __init__(self, labeled: KeyedDataset, unlabeled: UnlabeledDataset, order: Order, per_label: int) -> None:
        self.labeled, self.unlabeled, self.order, self.per_label = labeled, unlabeled, order, per_label

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> LabeledBatch | UserError:
        batch: Any = self.labeled.__getitems__(keys)
        if isinstance(batch, UserError):
            return batch
        step, slot = divmod(keys[0][0] * self.per_label, self.order.global_batch)
        try:
            views = self.unlabeled.__getitems__(
                self.order.at(step * self.order.global_batch, slot, len(keys) * self.per_label)
            )
        except UserError as error:
            return error
        batch.weak, batch.strong = views.weak, views.strong
        batch.replaced += views.replaced
        batch.bad = [*batch.bad, *views.bad]
        return batch
