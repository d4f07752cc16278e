"""The interface of a kind of label, `labels/*.py`: how labeled images are opened, augmented, judged and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from mpp.data.labeled_sets import LabeledBatch
from mpp.data.loader import KeyedDataset
from mpp.data.readers import LabeledImages
from mpp.finetuning.model import Supervised
from mpp.recipe.finetune import FinetuneData
from mpp.recipe.flat import JsonObject
from mpp.recipe.sections import Section


class Predicted(NamedTuple):
    """What a model with labels at places predicts for an image."""

    rows: list[JsonObject]
    """Of the CSV file."""
    overlay: Tensor | None
    """(3, h, w) uint8; None: no pictures are asked for."""
    picture: Image.Image | None = None
    """An image file of the prediction itself, beside the overlay; None: there is none."""


class LabelKind:
    """One kind of label. A task names its kind in `Task.labels`.

    Args:
        data: The recipe's section of that name, resolved.
        task: The recipe's section of that name.
    """

    allowed_values: ClassVar[dict[str, tuple[object, ...]]] = {}
    """Recipe keys that mean nothing for it, or not with every value, and the values that are allowed."""
    at_every_place: ClassVar[bool] = False
    """Whether the task reads maps of the encoder, not its vector."""
    eight_bit_only: ClassVar[bool] = False
    """Whether images must be of 8 bit."""
    independent_classes: ClassVar[bool] = False
    """Whether an image may have several classes, or none."""
    least_classes: ClassVar[int] = 1
    judged_at_once: ClassVar[int] = 256
    """Images that are judged at once, unless optim.max_batch_per_device is less."""
    columns: ClassVar[tuple[str, ...]] = ("image",)
    """Of the CSV file that predictions at places go to."""
    predictions_are_files: ClassVar[bool] = False
    """Whether predictions at places need a folder."""

    def __init__(self, data: FinetuneData, task: Section) -> None:
        self.data, self.task = data, task

    def open(self, places: tuple[str, ...], *, key: str, classes: list[str] | None) -> LabeledImages:
        """Open labeled images.

        Args:
            places: As the recipe names them.
            key: Where the recipe names them, for messages.
            classes: Those of the training images, which validation images must share; None: these are the training
                images.

        Raises:
            UserError: Labels are missing or wrong.
        """
        raise NotImplementedError

    def training_set(self, images: LabeledImages, subset: np.ndarray, seed: int) -> KeyedDataset:
        """Return a dataset of augmented images, whose keys are (position, 0, place in the subset)."""
        raise NotImplementedError

    def judging_set(self, images: LabeledImages, views: int = 1) -> KeyedDataset:
        """Return a dataset of the same images every time, whose keys are numbers of images."""
        raise NotImplementedError

    def check_augmentation(self) -> None:
        """Check that the augmentation can be made.

        Raises:
            UserError: It cannot.
        """

    def counts(self, images: LabeledImages, subset: np.ndarray) -> np.ndarray:
        """Return how often each class occurs in a subset, (classes,)."""
        return np.bincount(images.strata[subset], minlength=len(images.classes))

    def readable_part(self, batch: LabeledBatch) -> tuple[object, object]:
        """Return images and labels of a batch without those that could not be read."""
        raise NotImplementedError

    def warnings(self, images: LabeledImages, key: str) -> list[str]:
        """Return lines about labels that deserve a second look."""
        return []

    def hint_of_one_class(self, images: LabeledImages) -> str:
        """Return the end of a message about images of only one class; "" if there is nothing to add."""
        return ""

    def draw(self, model: Supervised, images: LabeledImages, out: Path) -> None:
        """Draw truth and prediction of a few validation images, if there is a picture of that."""

    # ---- predictions at places

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """Return the size to which an image of this size is scaled.

        Raises:
            BadImage: It would be too large.
        """
        raise NotImplementedError

    def predict(self, model: Supervised, images: Sequence[Tensor]) -> list[Any]:
        """Return what a model predicts for images (C, h, w) uint8, at their own size."""
        raise NotImplementedError

    def describe(self, name: str, image: Tensor, predicted: Any, classes: list[str], out: Path | None) -> Predicted:
        """Return rows and pictures of one prediction.

        Args:
            name: Of the image.
            image: (C, h, w) uint8.
            predicted: What `predict` gave for it.
            classes: Names.
            out: Where a file of it goes; None: no pictures are asked for.
        """
        raise NotImplementedError
