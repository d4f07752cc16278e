"""What a fine-tuned model says of places in images: a mask of classes, or boxes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mpp.data.dense_sets import fit_inside, fit_shorter_side, on_canvas, scaled_to, whole_image, within
from mpp.data.files import read_regular
from mpp.drawing.overlays import LEAST_SCORE, colours, over_boxes, over_pixels
from mpp.errors import BadImage, UserError
from mpp.finetuning.model import Dense, load_dense

BATCH = 16
BOX_COLUMNS = ["image", "class", "score", "x0", "y0", "x1", "y1"]


class DensePredictor:
    """A fine-tuned cell of task: segment or detect, or its export. UserError where it is not whole."""

    def __init__(self, source: str | Path) -> None:
        self.model: Dense
        self.model, self.recipe, self.classes = load_dense(source)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.labels: str = self.model.task.labels

    def fit(self, h: int, w: int) -> tuple[int, int]:
        """The size to which an image is scaled. BadImage."""
        size, data = self.recipe.data.image_size, self.recipe.data
        if self.labels == "boxes":
            return fit_inside(size)(h, w)
        return within(fit_shorter_side(data.val_side_px or min(size), size)(h, w), data.max_image_pixels)

    def read(self, path: str) -> Tensor:
        """(C, h, w) uint8. BadImage."""
        image = whole_image(read_regular(path), **self.recipe.data.decoding())
        self.fit(int(image.shape[1]), int(image.shape[2]))
        return image

    @torch.no_grad()
    def masks(self, images: Sequence[Tensor]) -> list[Tensor]:
        """(C, h, w) uint8 each -> (h, w) uint8 classes each."""
        size = self.recipe.data.image_size
        sizes = [(int(i.shape[1]), int(i.shape[2])) for i in images]
        scaled = [scaled_to(image, self.fit(*own)) for image, own in zip(images, sizes, strict=True)]
        return [m.cpu() for m in self.model.task.predict(self.model.run, scaled, sizes, size)]

    @torch.no_grad()
    def boxes(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """(C, h, w) uint8 each -> boxes (n, 4) as x0, y0, x1, y1 in pixels, labels and scores (n,), surest first."""
        size = self.recipe.data.image_size
        scaled = [scaled_to(image, self.fit(int(image.shape[1]), int(image.shape[2]))) for image in images]
        places = [
            {"scale": torch.tensor(s.shape[2] / i.shape[2]), "size": torch.tensor(i.shape[1:])}
            for s, i in zip(scaled, images, strict=True)
        ]
        canvases = torch.stack([on_canvas(image, size) for image in scaled])
        found: list[dict[str, Tensor]] = self.model.task.predict(self.model.run, canvases, places)
        orders = [one["scores"].argsort(descending=True, stable=True) for one in found]
        return [{k: v[order] for k, v in one.items()} for one, order in zip(found, orders, strict=True)]


def predict_dense(
    source: str | Path, images: Sequence[str], *, folder: str | Path | None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """-> rows, and what could not be read and why.

    Of boxes a row each with at least a score of LEAST_SCORE, and in `folder` overlays/; of masks a row for each image,
    and in `folder`, which must be given, masks/ with PNG files of class numbers and overlays/. UserError.
    """
    images = list(dict.fromkeys(images))
    predictor = DensePredictor(source)
    if predictor.labels == "mask" and folder is None:
        raise UserError("--report: this model makes masks; give a folder for them")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in images])
    stems = {path: os.path.splitext(os.path.relpath(os.path.abspath(path), root))[0] for path in images}
    if folder is not None and len(set(stems.values())) < len(images):
        stem = next(s for s in stems.values() if list(stems.values()).count(s) > 1)
        raise UserError(f"--report: several images are named {stem}; their pictures would overwrite each other")
    rows: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    for start in range(0, len(images), BATCH):
        names, read = [], []
        for name in images[start : start + BATCH]:
            try:
                read.append(predictor.read(name))
                names.append(name)
            except BadImage as error:
                unreadable[name] = str(error)
        if not read:
            continue
        if predictor.labels == "mask":
            for name, image, mask in zip(names, read, predictor.masks(read), strict=True):
                path = Path(str(folder)) / "masks" / f"{stems[name]}.png"
                _save(_with_palette(mask, len(predictor.classes)), path)
                _draw(over_pixels(image, mask, len(predictor.classes)), folder, stems[name])
                rows.append({"image": name, "mask": str(path)})
            continue
        for name, image, found in zip(names, read, predictor.boxes(read), strict=True):
            sure = found["scores"] >= LEAST_SCORE
            boxes, labels, scores = found["boxes"][sure], found["labels"][sure], found["scores"][sure]
            for box, label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True):
                row = (name, predictor.classes[label], score, *(round(v, 1) for v in box))
                rows.append(dict(zip(BOX_COLUMNS, row, strict=True)))
            if folder is not None:
                _draw(over_boxes(image, boxes, labels, predictor.classes), folder, stems[name])
    if len(unreadable) == len(images):
        name, why = next(iter(unreadable.items()))
        raise UserError(f"not one image can be read; the first: {name}: {why}")
    return rows, unreadable


def _with_palette(mask: Tensor, classes: int) -> Image.Image:
    """Numbers are classes; colours are for people."""
    picture = Image.fromarray(mask.numpy())
    picture.putpalette(colours(classes).flatten().tolist())
    return picture


def _draw(picture: Tensor, folder: str | Path | None, stem: str) -> None:
    _save(Image.fromarray(picture.permute(1, 2, 0).numpy()), Path(str(folder)) / "overlays" / f"{stem}.png")


def _save(picture: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
