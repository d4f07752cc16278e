"""A class for each pixel of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mpp.data.dense_sets import WholeDataset, fit_shorter_side, scaled_to, within
from mpp.data.loader import KeyedDataset
from mpp.data.masks import open_segmented
from mpp.data.places import Segmented
from mpp.data.readers import LabeledImages
from mpp.drawing.overlays import colours, over_pixels, show
from mpp.finetuning.label_kind import Predicted
from mpp.finetuning.model import Supervised
from mpp.finetuning.place_labels import PlaceLabels


class MaskLabels(PlaceLabels):
    """Images that each have a PNG mask, whose values are class numbers."""

    at_every_place = True
    allowed_values: ClassVar[dict[str, tuple[object, ...]]] = {
        "mixup": (0.0,),
        "cutmix": (0.0,),
        "balance": ("none", "loss"),
        "distill": (None,),
        "head_init": ("zero",),
        "unlabeled": (None,),
        "data.labels_per_class": (None,),
        "pool": ("mean",),
        "fc_norm": (None,),
        "data.auto_augment": (None,),
        "data.erase": (0.0,),
        "data.val_crop_fraction": (1.0,),
        "data.val_views": (1,),
    }
    least_classes = 2
    columns = ("image", "mask")
    predictions_are_files = True

    def open(self, places: tuple[str, ...], *, key: str, classes: list[str] | None) -> Segmented:
        return open_segmented(places, key=key, classes=classes, ignore_index=self._ignore_index)

    @property
    def _ignore_index(self) -> int:
        return int(self.task.model_dump()["ignore_index"])

    def judging_set(self, images: LabeledImages, views: int = 1) -> KeyedDataset:
        assert isinstance(images, Segmented)
        return WholeDataset(images, self._fit_shorter_side(), None, **self.data.decoding())

    def counts(self, images: LabeledImages, subset: np.ndarray) -> np.ndarray:
        """Return the number of pixels of each class, (classes,)."""
        assert isinstance(images, Segmented)
        pixels: np.ndarray = images.pixels[subset].sum(0)
        return pixels

    def hint_of_one_class(self, images: LabeledImages) -> str:
        """Return a note about the second mask value if it is `task.ignore_index`, which does not count as a class."""
        assert isinstance(images, Segmented)
        value = self._ignore_index
        if not images.ignored:
            return ""
        return (
            f". The masks also hold the value {value} at {images.ignored} pixels; it is task.ignore_index and counts "
            f"for nothing. If {value} is the second class, write it as 1"
        )

    def draw(self, model: Supervised, images: LabeledImages, out: Path) -> None:
        batch = self.first_images(images)
        if batch is None:
            return
        classes, ignored = images.classes, self._ignore_index
        sizes = [(mask.shape[0], mask.shape[1]) for mask in batch.labels]
        predicted = model.task.predict(model.run, batch.images, sizes, self.data.image_size)
        rows = []
        for image, mask, classes_at in zip(batch.images, batch.labels, predicted, strict=True):
            whole = scaled_to(image, (mask.shape[0], mask.shape[1]))
            truth = over_pixels(whole, mask, len(classes), mask == ignored)
            rows.append((whole, truth, over_pixels(whole, classes_at.cpu(), len(classes))))
        some_ignored = any((mask == ignored).any() for mask in batch.labels)
        show(rows, classes, out, extra="ignored" if some_ignored else None)

    def _fit_shorter_side(self) -> Callable[[int, int], tuple[int, int]]:
        size = self.data.image_size
        return fit_shorter_side(self.data.val_side_px or min(size), size)

    def fit(self, height: int, width: int) -> tuple[int, int]:
        return within(self._fit_shorter_side()(height, width), self.data.max_image_pixels)

    @torch.no_grad()
    def predict(self, model: Supervised, images: Sequence[Tensor]) -> list[Tensor]:
        """Return the classes of each image, (h, w) uint8."""
        sizes = [(int(i.shape[1]), int(i.shape[2])) for i in images]
        scaled = [scaled_to(image, self.fit(*size)) for image, size in zip(images, sizes, strict=True)]
        return [mask.cpu() for mask in model.task.predict(model.run, scaled, sizes, self.data.image_size)]

    def describe(self, name: str, image: Tensor, predicted: Tensor, classes: list[str], out: Path | None) -> Predicted:
        picture = Image.fromarray(predicted.numpy())
        # the pixel values of the file are class numbers, and the palette only gives them visible colours
        picture.putpalette(colours(len(classes)).flatten().tolist())
        return Predicted([{"image": name, "mask": str(out)}], over_pixels(image, predicted, len(classes)), picture)
