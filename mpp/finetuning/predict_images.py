"""Predict the classes of images with a fine-tuned encoder, and report its mistakes if the true classes are known."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mpp.data.decoding.decode import decode_crop, view_boxes
from mpp.data.files import read_regular
from mpp.data.shards.reader import images_of
from mpp.drawing.pixels import as_rgb
from mpp.drawing.plots import confusion, gallery
from mpp.encoders.checksums import has_head
from mpp.encoders.resolve import decoding_of, stored_recipe
from mpp.encoders.sources import class_names, load_encoder
from mpp.encoders.timm_model import TimmModel
from mpp.errors import BadImage, UserError
from mpp.finetuning.model import over_views
from mpp.finetuning.predict_places import predict_places
from mpp.recipe.flat import JsonObject
from mpp.runs.records import encoder_folder

BATCH = 64
WORST = 24
"""Most mistakes that are drawn."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image."""

    image: str
    probabilities: np.ndarray
    """Probability of each class, (classes,) float32, the mean over views."""
    pixels: Tensor
    """The central crop in colours, (3, H, W) uint8."""

    @property
    def said(self) -> int:
        return int(self.probabilities.argmax())


@dataclass
class Report:
    """Predictions compared with the true classes."""

    classes: list[str]
    counts: np.ndarray
    """Confusion matrix: (true class, predicted class) int64 numbers of images."""
    mistakes: list[tuple[Prediction, int]] = field(default_factory=list)
    """(prediction, true class) of the wrong predictions with the highest probabilities, highest first."""

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.counts) / max(self.counts.sum(), 1))


class Predictor:
    """A fine-tuned model, or its export, with its classifier."""

    model: TimmModel

    def __init__(self, source: str | Path, views: Literal[1, 2, 10] = 1) -> None:
        """Open a fine-tuned encoder.

        Args:
            source: Fine-tuned model, such as RUN/pretrained-seed0, or its export.
            views: Crops of each image that are averaged. 1 is the central crop, 2 adds its mirror image, 10 also adds
                the four corners with their mirror images (Krizhevsky et al. 2012, section 4.1).

        Raises:
            UserError: If the model has no classifier with class names.
        """
        folder = encoder_folder(source)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_encoder(folder).eval().to(self.device)
        names = class_names(folder)
        if not self.model.num_classes or not names:
            raise UserError(
                f"{source}: has no classifier with class names; give a fine-tuned model, such as RUN/pretrained-seed0"
            )
        self.classes = names
        self.views = views
        recipe = stored_recipe(folder)
        self.several = recipe.get("task", {}).get("name") == "multilabel"
        config = self.model.pretrained_cfg
        self.channels, *size = config["input_size"]
        self.size = (int(size[0]), int(size[1]))
        self.decoding = decoding_of(folder, self.channels)
        self.fraction = float(config.get("crop_pct") or 1.0)
        self.mean, self.std = (
            255 * torch.tensor(config[key]).view(-1, 1, 1).to(self.device) for key in ("mean", "std")
        )

    def crops(self, data: bytes) -> Tensor:
        """Return the crops of an image file, (crops, C, H, W), the central crop first. Images of 8 bit give uint8.

        Raises:
            BadImage: If the file cannot be decoded.
        """

        boxes = view_boxes(self.views, self.size, self.fraction)
        return torch.stack([decode_crop(data, b, self.size, **self.decoding) for b in boxes])

    @torch.no_grad()
    def probabilities(self, crops: Tensor) -> Tensor:
        """Compute probabilities: (B, crops, C, H, W) uint8 -> (B, classes) float32.

        They are means over the crops and, with more than one view, over their mirror images. They sum to 1, unless an
        image may have several classes: then each class has an independent probability.
        """

        def run(images: Tensor) -> Tensor:
            return self.model((images.to(self.device).float() - self.mean) / self.std)

        return over_views(run, crops, mirrored=self.views > 1, independent=self.several).cpu()


def predict(predictor: Predictor, images: Sequence[str], unreadable: dict[str, str]) -> Iterator[Prediction]:
    """Yield the predictions for images, in their order.

    Args:
        predictor: Model.
        images: Image files.
        unreadable: Dictionary to which each file that cannot be read is added, with the reason.
    """
    for start in range(0, len(images), BATCH):
        readable, crops = [], []
        for name in images[start : start + BATCH]:
            try:
                crops.append(predictor.crops(read_regular(name)))
            except BadImage as error:
                unreadable[name] = str(error)
                continue
            readable.append(name)
        if readable:
            probabilities = predictor.probabilities(torch.stack(crops)).numpy()
            for name, views, p in zip(readable, crops, probabilities, strict=True):
                yield Prediction(name, p, as_rgb(views[0]))


def predict_files(
    source: str | Path,
    places: Sequence[str],
    *,
    views: Literal[1, 2, 10] = 1,
    top: int = 1,
    out: str | Path | None = None,
    report: str | Path | None = None,
) -> tuple[list[JsonObject], dict[str, str], Report | None]:
    """Predict image files or folders.

    A model of task: segment or detect predicts by `predict_places`. It has neither views nor top.

    Args:
        source: Fine-tuned model, such as RUN/pretrained-seed0, or its export.
        places: Files and folders.
        views: Crops of each image that are averaged: 1, 2 (mirrored) or 10 (corners, mirrored).
        top: Number of likeliest classes in each row.
        out: CSV file for the rows. None means no file.
        report: Folder for the confusion matrix and the worst mistakes. Each image must then be in a folder that is
            named after its true class. A model that predicts places puts its pictures there.

    Returns:
        The rows, the unreadable files with the reasons, and the report. There is a row for each image, or, for a model
        of task: detect, for each box. The report is None if none is requested or the model predicts places.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    if has_head(encoder_folder(source)):
        for option, value in (("views", views), ("top", top)):
            if value != 1:
                raise UserError(f"--{option}: only 1 is possible for {source}, which predicts places in an image")
        if out is not None:
            _check_writable(Path(out))
        columns, rows, unreadable = predict_places(source, images_of(list(map(_images_part, places))), folder=report)
        if out is not None:
            _write_csv(Path(out), list(columns), [list(row.values()) for row in rows])
        return rows, unreadable, None
    predictor = Predictor(source, views)
    images = images_of(places)
    for path in (out, Path(report) / "confusion.csv" if report is not None else None):
        if path is not None:
            _check_writable(Path(path))
    index = {name: i for i, name in enumerate(predictor.classes)}
    if report is not None:
        if predictor.several:
            raise UserError("--report: only for one label an image")
        for name in images:
            if Path(name).absolute().parent.name not in index:
                raise UserError(
                    f"--report: {name}: its folder is none of the classes ({', '.join(predictor.classes[:5])}"
                    + (" …)" if len(index) > 5 else ")")
                )
    counts = np.zeros((len(index), len(index)), dtype=np.int64)
    judged = Report(predictor.classes, counts) if report is not None else None
    rows, unreadable = [], {}
    for prediction in predict(predictor, images, unreadable):
        order = np.argsort(-prediction.probabilities, kind="stable")[:top]
        row: JsonObject = {"image": prediction.image}
        for rank, c in enumerate(order, 1):
            suffix = "" if rank == 1 else f"_{rank}"
            row |= {f"class{suffix}": predictor.classes[c], f"probability{suffix}": float(prediction.probabilities[c])}
        rows.append(row)
        if judged is not None:
            true = index[Path(prediction.image).absolute().parent.name]
            counts[true, prediction.said] += 1
            if true != prediction.said:
                surest = [*judged.mistakes, (prediction, true)]
                judged.mistakes = sorted(surest, key=lambda m: -float(m[0].probabilities.max()))[:WORST]
    if not rows:
        name, why = next(iter(unreadable.items()))
        raise UserError(f"not one image can be read; the first: {name}: {why}")
    if out is not None:
        _write_csv(Path(out), list(rows[0]), [list(row.values()) for row in rows])
    if judged is not None:
        _write_report(judged, Path(report))  # type: ignore[arg-type]
    return rows, unreadable, judged


def _images_part(place: str) -> str:
    """Return images/ of a labeled data set, which is a folder with masks/ or annotations.json; else the place."""
    labels = any(os.path.exists(os.path.join(place, name)) for name in ("masks", "annotations.json"))
    images = os.path.join(place, "images")
    return images if labels and os.path.isdir(images) else place


def _check_writable(path: Path) -> None:
    """Check that a file can be written, before the images are read. An existing file keeps its contents.

    Raises:
        UserError: If the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _write_csv(path: Path, header: list[str], rows: list[list[object]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
            csv.writer(f).writerows([header, *rows])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _write_report(report: Report, folder: Path) -> None:
    rows = [[name, *map(int, counts)] for name, counts in zip(report.classes, report.counts, strict=True)]
    _write_csv(folder / "confusion.csv", ["true \\ said", *report.classes], rows)
    confusion(report.counts, report.classes, folder / "confusion.png")
    pictures = [
        (p.pixels, f"{report.classes[true]}\nsaid {report.classes[p.said]}, {p.probabilities.max():.0%}")
        for p, true in report.mistakes
    ]
    if pictures:
        gallery(pictures, folder / "mistakes.png")
