"""Boxes with classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mpp.data.boxes import open_detected
from mpp.data.dense_sets import WholeDataset, fit_inside, on_canvas, scaled_to
from mpp.data.loader import KeyedDataset
from mpp.data.places import Detected
from mpp.data.readers import LabeledImages
from mpp.drawing.overlays import LEAST_SCORE, over_boxes, show
from mpp.finetuning.label_kind import Predicted
from mpp.finetuning.model import Supervised
from mpp.finetuning.place_labels import PlaceLabels


class BoxesLabels(PlaceLabels):
    """Images whose boxes are listed in a COCO file."""

    at_every_place = True
    allowed_values: ClassVar[dict[str, tuple[object, ...]]] = {
        "mixup": (0.0,),
        "cutmix": (0.0,),
        "balance": ("none",),
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
        "data.val_side_px": (None,),
    }
    columns = ("image", "class", "score", "x0", "y0", "x1", "y1")

    def open(self, places: tuple[str, ...], *, key: str, classes: list[str] | None) -> Detected:
        return open_detected(places, key=key, classes=classes)

    def judging_set(self, images: LabeledImages, views: int = 1) -> KeyedDataset:
        assert isinstance(images, Detected)
        size = self.data.image_size
        return WholeDataset(images, fit_inside(size), size, **self.data.decoding())

    def warnings(self, images: LabeledImages, key: str) -> list[str]:
        assert isinstance(images, Detected)
        if not images.cut:
            return []
        many = f"{len(images.cut)} boxes run past their image and are cut off"
        return [f"{key}: {many}, such as {images.cut[0]}; a box is [x, y, width, height] in pixels"]

    def draw(self, model: Supervised, images: LabeledImages, out: Path) -> None:
        batch = self.first_images(images)
        if batch is None:
            return
        rows = []
        predicted = model.task.predict(model.run, batch.images, batch.labels)
        for image, true, detections in zip(batch.images, batch.labels, predicted, strict=True):
            sure = detections["scores"] >= LEAST_SCORE
            drawn = (
                over_boxes(image, boxes["boxes"][chosen] * true["scale"], boxes["labels"][chosen], images.classes)
                for boxes, chosen in ((true, slice(None)), (detections, sure))
            )
            rows.append((image, *drawn))
        show(rows, images.classes, out)

    def fit(self, height: int, width: int) -> tuple[int, int]:
        return fit_inside(self.data.image_size)(height, width)

    @torch.no_grad()
    def predict(self, model: Supervised, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return boxes (n, 4) as x0, y0, x1, y1 in pixels, labels (n,) and scores (n,) of each image.

        They are sorted by score, highest first.
        """
        scaled = [scaled_to(image, self.fit(int(image.shape[1]), int(image.shape[2]))) for image in images]
        places = [
            {"scale": torch.tensor(s.shape[2] / i.shape[2]), "size": torch.tensor(i.shape[1:])}
            for s, i in zip(scaled, images, strict=True)
        ]
        canvases = torch.stack([on_canvas(image, self.data.image_size) for image in scaled])
        detections: list[dict[str, Tensor]] = model.task.predict(model.run, canvases, places)
        orders = [one["scores"].argsort(descending=True, stable=True) for one in detections]
        return [{k: v[order] for k, v in one.items()} for one, order in zip(detections, orders, strict=True)]

    def describe(
        self, name: str, image: Tensor, predicted: dict[str, Tensor], classes: list[str], out: Path | None
    ) -> Predicted:
        sure = predicted["scores"] >= LEAST_SCORE
        boxes, labels, scores = predicted["boxes"][sure], predicted["labels"][sure], predicted["scores"][sure]
        rows = [
            dict(zip(self.columns, (name, classes[label], score, *(round(v, 1) for v in box)), strict=True))
            for box, label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True)
        ]
        return Predicted(rows, over_boxes(image, boxes, labels, classes) if out is not None else None)
