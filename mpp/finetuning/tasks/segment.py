"""Semantic segmentation: a class for every pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mpp.encoders.maps import FeatureMaps
from mpp.finetuning.pyramid import MapNorm, Pyramid
from mpp.finetuning.task import Task
from mpp.recipe.values import BelowOne, Int, PositiveInt

LOGITS_AT_ONCE = 2**26
"""Windows that are judged together have no more logits than this: 256 MB."""
WINDOWS_AT_ONCE = 64
NEVER = -1e9
"""Logit of a class that cannot be."""


class SegmentTask(Task):
    """Segment images: the head on the encoder's maps, its loss and its metrics.

    Args:
        head: linear: a linear layer on the last map. fpn: a pyramid whose levels are added at the finest (the semantic
            branch of Panoptic FPN, Kirillov et al. 2019, lighter).
        width: Channels of every pyramid level.
        finest: Cells of the first pyramid level along a cell of a plain encoder (ViTDet: 4). Hierarchical encoders have
            levels of their own.
        ignore_index: Value of mask pixels that count neither in training nor in the score.
        window_overlap: Overlap of neighbouring windows, as a fraction, when an image is larger than one window.
    """

    labels = "mask"
    headline = "miou"

    def __init__(
        self,
        maps: FeatureMaps,
        num_classes: int,
        *,
        head: Literal["linear", "fpn"] = "fpn",
        width: PositiveInt = 128,
        finest: Literal[1, 2, 4] = 4,
        ignore_index: Annotated[Int, Field(ge=0, le=255)] = 255,
        window_overlap: BelowOne = 1 / 3,
    ) -> None:
        super().__init__()
        self.num_classes, self.ignore_index, self.window_overlap = num_classes, ignore_index, window_overlap
        self.pyramid = Pyramid(maps, width, finest=finest, last_only=False) if head == "fpn" else None
        self.norm = MapNorm(maps.dims[-1]) if head == "linear" else nn.Identity()
        self.out = nn.Conv2d(width if head == "fpn" else maps.dims[-1], num_classes, 1)
        nn.init.normal_(self.out.weight, std=0.01)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int], targets: object = None) -> Tensor:
        """(B, D_i, h_i, w_i) each -> (B, classes, H, W) logits, bilinear from the finest map."""
        if self.pyramid is None:
            x = self.norm(maps[-1])
        else:
            levels = self.pyramid(maps)
            finest = tuple(levels[0].shape[-2:])
            x = levels[0]
            for level in levels[1:]:
                x = x + F.interpolate(level, finest, mode="bilinear", align_corners=False)
            x = F.gelu(x)
        return F.interpolate(self.out(x).float(), size, mode="bilinear", align_corners=False)

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Return a mean over the pixels of each image, then over images.

        So no image outweighs another, however its batch is shared between processes.

        Args:
            logits: (B, classes, H, W).
            masks: (B, H, W) uint8.
        """
        weights = None if self.class_weights is None else self.class_weights.float()
        each = F.cross_entropy(
            logits.float(), masks.long(), weight=weights, ignore_index=self.ignore_index, reduction="none"
        )
        counted = (masks != self.ignore_index).sum((1, 2)).clamp_min(1)
        return (each.sum((1, 2)) / counted).mean()

    @torch.no_grad()
    def predict(
        self,
        run: Callable[[Tensor], Tensor],
        images: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        window: tuple[int, int],
    ) -> list[Tensor]:
        """Predict the class of every pixel; logits of overlapping windows are averaged.

        Args:
            run: (B, C, H, W) uint8 -> (B, classes, H, W) logits.
            images: (C, h, w) uint8, none smaller than the window.
            sizes: (h0, w0) of the files.
            window: (H, W) that the model reads at a time.

        Returns:
            (h0, w0) uint8 classes of each image.
        """
        places = [(i, *at) for i, image in enumerate(images) for at in self._windows(image.shape[-2:], window)]
        at_once = min(max(LOGITS_AT_ONCE // (self.num_classes * window[0] * window[1]), 1), WINDOWS_AT_ONCE)
        classes_of: list[Tensor] = []
        sums: dict[int, Tensor] = {}
        counts: dict[int, Tensor] = {}
        for start in range(0, len(places), at_once):
            part = places[start : start + at_once]
            x = torch.stack([images[i][:, y : y + window[0], x : x + window[1]] for i, y, x in part])
            found_here = run(x)
            if self.ignore_index < self.num_classes:  # nothing has trained it
                found_here[:, self.ignore_index] = NEVER
            for (i, y, left), logits in zip(part, found_here, strict=True):
                if i not in sums:
                    shape = images[i].shape[-2:]
                    sums[i] = logits.new_zeros((self.num_classes, *shape), dtype=torch.float32)
                    counts[i] = logits.new_zeros(shape, dtype=torch.float32)
                sums[i][:, y : y + window[0], left : left + window[1]] += logits
                counts[i][y : y + window[0], left : left + window[1]] += 1
            done = [i for i in sums if i < part[-1][0] or start + at_once >= len(places)]
            for i in done:
                classes_of.append(_classes_at(sums.pop(i).div_(counts.pop(i)), sizes[i]))
        return classes_of

    def _windows(self, size: Sequence[int], window: tuple[int, int]) -> list[tuple[int, int]]:
        """Upper left corners of the windows that cover (h, w), evenly spaced."""
        tops, lefts = (
            [round(k * (side - w) / max(n - 1, 1)) for k in range(n)]
            for side, w in zip(size, window, strict=True)
            for n in [1 + -(-(side - w) // max(round(w * (1 - self.window_overlap)), 1))]
        )
        return [(y, x) for y in tops for x in lefts]

    def judge(
        self, run: Callable[[Tensor], Tensor], images: list[Tensor], masks: list[Tensor], window: tuple[int, int]
    ) -> Tensor:
        """Return (classes, classes) int64: pixels by true class and predicted class, on the CPU."""
        total = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        predicted = self.predict(run, images, [(m.shape[0], m.shape[1]) for m in masks], window)
        for mask, classes in zip(masks, predicted, strict=True):
            counted = mask != self.ignore_index
            pairs = mask[counted].long() * self.num_classes + classes.cpu()[counted].long()
            total += torch.bincount(pairs, minlength=self.num_classes**2).view_as(total)
        return total

    def metrics(self, judged: list[Tensor], *, headline_only: bool = False) -> dict[str, float]:
        """Return metrics over all pixels of all images (Everingham et al. 2015).

        miou: mean intersection over union of the classes that occur or were predicted. pixel_accuracy. mean_accuracy:
        mean recall of the classes that occur.
        """
        total = torch.stack(judged).sum(0).double()
        iou = self.per_class(judged)
        headline = {"miou": float(iou[~iou.isnan()].mean())}
        if headline_only:
            return headline
        recall = (total.diagonal() / total.sum(1))[total.sum(1) > 0]
        return {
            **headline,
            "pixel_accuracy": float(total.diagonal().sum() / total.sum()),
            "mean_accuracy": float(recall.mean()),
        }

    def per_class(self, judged: list[Tensor]) -> Tensor:
        """(classes,) intersection over union; nan where a class neither occurs nor was said."""
        total = torch.stack(judged).sum(0).double()
        hits = total.diagonal()
        return hits / (total.sum(0) + total.sum(1) - hits)  # 0 / 0 is nan


def _classes_at(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(classes, h, w) -> (h0, w0) uint8: the likeliest after bilinear interpolation, in bands of rows that fit."""
    rows, columns = size
    if tuple(logits.shape[1:]) == tuple(size):
        return logits.argmax(0).to(torch.uint8)
    band = max(LOGITS_AT_ONCE // (len(logits) * columns), 1)
    x = (torch.arange(columns, device=logits.device) + 0.5) * 2 / columns - 1
    y = (torch.arange(rows, device=logits.device) + 0.5) * 2 / rows - 1
    parts = []
    for start in range(0, rows, band):
        rows_at = y[start : start + band]
        grid = torch.stack([x.expand(len(rows_at), -1), rows_at.unsqueeze(1).expand(-1, columns)], -1)
        there = F.grid_sample(logits[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)
        parts.append(there[0].argmax(0).to(torch.uint8))
    return torch.cat(parts)
