"""The interface of the kinds of label in `labels/*.py`: how labeled images are opened, augmented, judged and drawn."""

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
    """The prediction of a model with labels at places for one image."""

    rows: list[JsonObject]
    """Rows of the CSV file."""
    overlay: Tensor | None
    """The image with the prediction drawn over it, (3, h, w) uint8. None if no pictures are requested."""
    picture: Image.Image | None = None
    """The prediction itself as an image, for example a mask. None if the kind of label has no such image."""


class LabelKind:
    """One kind of label. A task names its kind in `Task.labels`.

    Args:
        data: Section `data` of the recipe, resolved.
        task: Section `task` of the recipe.
    """

    allowed_values: ClassVar[dict[str, tuple[object, ...]]] = {}
    """Recipe keys that this kind of label restricts, each with the values that it supports."""
    at_every_place: ClassVar[bool] = False
    """Whether the task reads feature maps of the encoder instead of its feature vector."""
    independent_classes: ClassVar[bool] = False
    """Whether an image may have several classes, or none."""
    least_classes: ClassVar[int] = 1
    """Least number of classes of the training images."""
    judged_at_once: ClassVar[int] = 256
    """Batch size for judging, unless optim.max_batch_per_device is smaller."""
    columns: ClassVar[tuple[str, ...]] = ("image",)
    """Columns of the CSV file of predictions at places."""
    predictions_are_files: ClassVar[bool] = False
    """Whether predictions at places are image files and so require a folder."""

    def __init__(self, data: FinetuneData, task: Section) -> None:
        self.data, self.task = data, task

    def open(self, places: tuple[str, ...], *, key: str, classes: list[str] | None) -> LabeledImages:
        """Open labeled images.

        Args:
            places: Files or folders, as given in the recipe.
            key: Recipe key that lists the places, for messages.
            classes: Classes of the training images, which validation images must share. None if these are the training
                images.

        Raises:
            UserError: If labels are missing or wrong.
        """
        raise NotImplementedError

    def training_set(self, images: LabeledImages, subset: np.ndarray, seed: int) -> KeyedDataset:
        """Return a dataset of augmented images, whose keys are (position, 0, index in the subset)."""
        raise NotImplementedError

    def judging_set(self, images: LabeledImages, views: int = 1) -> KeyedDataset:
        """Return a dataset of images without augmentation, whose keys are numbers of images."""
        raise NotImplementedError

    def check_augmentation(self) -> None:
        """Check that the augmentation can be made.

        Raises:
            UserError: If the augmentation cannot be made.
        """

    def counts(self, images: LabeledImages, subset: np.ndarray) -> np.ndarray:
        """Return how often each class occurs in a subset, (classes,)."""
        return np.bincount(images.strata[subset], minlength=len(images.classes))

    def readable_part(self, batch: LabeledBatch) -> tuple[object, object]:
        """Return the images and labels of a batch, without the images that could not be read."""
        raise NotImplementedError

    def warnings(self, images: LabeledImages, key: str) -> list[str]:
        """Return warnings about labels that are probably wrong, one line each."""
        return []

    def hint_of_one_class(self, images: LabeledImages) -> str:
        """Return the end of a message about images of only one class; "" if there is nothing to add."""
        return ""

    def draw(self, model: Supervised, images: LabeledImages, out: Path) -> None:
        """Draw the truth and the prediction of a few validation images, if this kind of label has such a picture."""

    # ---- predictions at places

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """Return the size (h, w) to which an image of this height and width is scaled before prediction.

        Raises:
            BadImage: If the scaled image would be too large.
        """
        raise NotImplementedError

    def predict(self, model: Supervised, images: Sequence[Tensor]) -> list[Any]:
        """Return the predictions of a model for images (C, h, w) in [0, 255], at the size of each image."""
        raise NotImplementedError

    def describe(self, name: str, image: Tensor, predicted: Any, classes: list[str], out: Path | None) -> Predicted:
        """Return rows and pictures of one prediction.

        Args:
            name: Name of the image.
            image: Image, (C, h, w) with values in [0, 255].
            predicted: Prediction for the image, as `predict` returns it.
            classes: Names of the classes.
            out: File for the prediction itself. None means that no pictures are requested.
        """
        raise NotImplementedError
