"""Labels of places in images: the common base of `labels/mask.py` and `labels/boxes.py`."""

from __future__ import annotations

import numpy as np

from mpp.data.dense_sets import DenseDataset
from mpp.data.labeled_sets import LabeledBatch
from mpp.data.loader import KeyedDataset
from mpp.data.places import Detected, Segmented
from mpp.data.readers import LabeledImages
from mpp.finetuning.label_kind import LabelKind

SHOWN = 8
"""Number of validation images that are drawn."""


class PlaceLabels(LabelKind):
    """Labels that move with the pixels of an image when it is cropped, scaled and flipped."""

    judged_at_once = 32

    def training_set(self, images: LabeledImages, subset: np.ndarray, seed: int) -> KeyedDataset:
        assert isinstance(images, Segmented | Detected)
        data = self.data
        return DenseDataset(
            images,
            subset,
            seed,
            size=data.image_size,
            scale=data.crop_scale,
            ratio=data.crop_ratio,
            flip=data.flip,
            color_jitter=data.color_jitter,
            **data.decoding(),
        )

    def readable_part(self, batch: LabeledBatch) -> tuple[object, object]:
        return batch.images, batch.labels  # these datasets already leave out unreadable images

    def first_images(self, images: LabeledImages) -> LabeledBatch | None:
        """Return the first validation images, prepared as for judging. None if none of them can be read."""
        batch = self.judging_set(images).__getitems__(list(range(min(SHOWN, len(images)))))
        return batch if isinstance(batch, LabeledBatch) and bool(batch.readable.any()) else None
