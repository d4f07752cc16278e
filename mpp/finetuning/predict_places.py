"""Predict places in images with a fine-tuned model: a mask of classes, or boxes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mpp.data.dense_sets import whole_image
from mpp.data.files import read_regular
from mpp.errors import BadImage, UserError
from mpp.finetuning.label_kind import LabelKind
from mpp.finetuning.model import load_dense
from mpp.finetuning.open_labels import open_label_kind
from mpp.recipe.flat import JsonObject

BATCH = 16


class PlacePredictor:
    """A fine-tuned model whose task has labels at places, or its export.

    Raises:
        UserError: If the folder is incomplete or damaged.
    """

    def __init__(self, source: str | Path) -> None:
        self.model, self.recipe, self.classes = load_dense(source)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.kind: LabelKind = open_label_kind(self.recipe)

    def read(self, path: str) -> Tensor:
        """Return the image of a file, (C, h, w) uint8, or float32 in [0, 255] if its values have a range.

        Raises:
            BadImage: If the file cannot be decoded, or the scaled image would be too large.
        """
        image = whole_image(read_regular(path), **self.recipe.data.decoding())
        self.kind.fit(int(image.shape[1]), int(image.shape[2]))  # raises BadImage if the scaled image is too large
        return image

    def predict(self, images: Sequence[Tensor]) -> list[object]:
        """Return the model's predictions for images, see `LabelKind.predict`."""
        return self.kind.predict(self.model, images)


def predict_places(
    source: str | Path, images: Sequence[str], *, folder: str | Path | None
) -> tuple[tuple[str, ...], list[JsonObject], dict[str, str]]:
    """Predict places in image files.

    Args:
        source: Folder of a trial or an export.
        images: Image files.
        folder: Folder for the pictures in overlays/. A model that predicts masks requires it, and also writes masks/
            with PNG files of class numbers. None means no pictures.

    Returns:
        The columns of the rows, the rows, and the unreadable files with the reasons. There is a row for each box, or,
        for masks, for each image.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    images = list(dict.fromkeys(images))
    predictor = PlacePredictor(source)
    kind = predictor.kind
    if kind.predictions_are_files and folder is None:
        raise UserError("--report: this model makes masks; give a folder for them")
    stems = _stems(images, unique=folder is not None)
    rows: list[JsonObject] = []
    unreadable: dict[str, str] = {}
    for start in range(0, len(images), BATCH):
        read: dict[str, Tensor] = {}
        for name in images[start : start + BATCH]:
            try:
                read[name] = predictor.read(name)
            except BadImage as error:
                unreadable[name] = str(error)
        if not read:
            continue
        for name, predicted in zip(read, predictor.predict(list(read.values())), strict=True):
            file = Path(folder) / "masks" / f"{stems[name]}.png" if folder is not None else None
            shown = kind.describe(name, read[name], predicted, predictor.classes, file)
            rows += shown.rows
            if shown.picture is not None and file is not None:
                _save(shown.picture, file)
            if folder is not None and shown.overlay is not None:
                overlay = Image.fromarray(shown.overlay.permute(1, 2, 0).numpy())
                _save(overlay, Path(folder) / "overlays" / f"{stems[name]}.png")
    if len(unreadable) == len(images):
        name, why = next(iter(unreadable.items()))
        raise UserError(f"not one image can be read; the first: {name}: {why}")
    return kind.columns, rows, unreadable


def _stems(images: Sequence[str], *, unique: bool) -> dict[str, str]:
    """Return the name of each image's pictures: its path below the common folder of all images, without suffix.

    Raises:
        UserError: If names must be unique and two images have the same name.
    """
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in images])
    stems = {path: os.path.splitext(os.path.relpath(os.path.abspath(path), root))[0] for path in images}
    if unique and len(set(stems.values())) < len(images):
        stem = next(s for s in stems.values() if list(stems.values()).count(s) > 1)
        raise UserError(f"--report: several images are named {stem}; their pictures would overwrite each other")
    return stems


def _save(picture: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
