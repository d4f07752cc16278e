"""Labels of whole images: the common base of `labels/one_class.py` and `labels/several_classes.py`."""

from __future__ import annotations

import numpy as np

from mpp.data.labeled import Labeled, open_labeled
from mpp.data.labeled_sets import CentreDataset, LabeledBatch, LabeledDataset
from mpp.data.loader import KeyedDataset
from mpp.data.readers import LabeledImages
from mpp.finetuning.augment import make_augmentation
from mpp.finetuning.label_kind import LabelKind


class ImageLabels(LabelKind):
    """Labels in the form of a folder with one subfolder per class, shards with labels, or a CSV file."""

    def open(self, places: tuple[str, ...], *, key: str, classes: list[str] | None) -> Labeled:
        return open_labeled(places, key=key, classes=classes, several=self.independent_classes, **self.data.opening())

    def training_set(self, images: LabeledImages, subset: np.ndarray, seed: int) -> KeyedDataset:
        assert isinstance(images, Labeled)
        return LabeledDataset(images, subset, make_augmentation(self.data), seed, **self.data.decoding())

    def judging_set(self, images: LabeledImages, views: int = 1) -> KeyedDataset:
        assert isinstance(images, Labeled)
        data = self.data
        return CentreDataset(images, data.image_size, data.val_crop_fraction, views=views, **data.decoding())

    def check_augmentation(self) -> None:
        make_augmentation(self.data)

    def readable_part(self, batch: LabeledBatch) -> tuple[object, object]:
        return batch.images[batch.readable], batch.labels[batch.readable]
