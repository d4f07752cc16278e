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
"""Most logits that windows predicted together, or a band of rows, may have: 256 MB in float32."""
WINDOWS_AT_ONCE = 64
"""Most windows that are predicted together."""
NEVER = -1e9
"""Logit of a class that must never be predicted."""


class SegmentTask(Task):
    """Segment images: the head on the encoder's maps, its loss and its metrics.

    Args:
        head: Head on the encoder's maps. linear: a linear layer on the last map. fpn: a pyramid whose levels are added
            at the size of the finest (a lighter semantic branch of Panoptic FPN, Kirillov et al. 2019).
        width: Channels of every pyramid level.
        finest: Cells of the first pyramid level along each side of a cell of a plain encoder (ViTDet: 4). Hierarchical
            encoders ignore it, because their stages are the levels.
        ignore_index: Value of mask pixels that count neither in training nor in the score.
        window_overlap: Overlap of neighbouring windows when an image is larger than one window, as a fraction of the
            window's side.
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
        """Compute logits: maps (B, D_i, h_i, w_i) -> (B, classes, H, W), bilinear from the finest map."""
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
        """Return the cross-entropy as a mean over the pixels of each image, then over images.

        So every image has the same weight, however the batch is divided among processes.

        Args:
            logits: Logits, (B, classes, H, W).
            masks: Class of each pixel, (B, H, W) uint8.
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
        """Predict the class of every pixel. Logits of overlapping windows are averaged.

        Args:
            run: Model that maps images (B, C, H, W) in [0, 255] to (B, classes, H, W) logits.
            images: Images, (C, h, w) in [0, 255], at least as large as the window.
            sizes: (h0, w0) of the files, in pixels.
            window: (H, W) that the model reads at a time, in pixels.

        Returns:
            Classes of each image, (h0, w0) uint8.
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
            if self.ignore_index < self.num_classes:  # the ignored class was never trained
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
        """Return the upper left corners (y, x) of evenly spaced windows that cover (h, w)."""
        tops, lefts = (
            [round(k * (side - w) / max(n - 1, 1)) for k in range(n)]
            for side, w in zip(size, window, strict=True)
            for n in [1 + -(-(side - w) // max(round(w * (1 - self.window_overlap)), 1))]
        )
        return [(y, x) for y in tops for x in lefts]

    def judge(
        self, run: Callable[[Tensor], Tensor], images: list[Tensor], masks: list[Tensor], window: tuple[int, int]
    ) -> Tensor:
        """Return the number of pixels by true and predicted class, (classes, classes) int64, on the CPU."""
        total = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        predicted = self.predict(run, images, [(m.shape[0], m.shape[1]) for m in masks], window)
        for mask, classes in zip(masks, predicted, strict=True):
            counted = mask != self.ignore_index
            pairs = mask[counted].long() * self.num_classes + classes.cpu()[counted].long()
            total += torch.bincount(pairs, minlength=self.num_classes**2).view_as(total)
        return total

    def metrics(self, judged: list[Tensor], *, headline_only: bool = False) -> dict[str, float]:
        """Return metrics over all pixels of all images (Everingham et al. 2015).

        miou: mean intersection over union of the classes that occur or were predicted.
        pixel_accuracy: fraction of pixels whose class is right.
        mean_accuracy: mean recall of the classes that occur.
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
        """Return the intersection over union of each class, (classes,).

        It is nan for a class that neither occurs nor was predicted.
        """
        total = torch.stack(judged).sum(0).double()
        hits = total.diagonal()
        return hits / (total.sum(0) + total.sum(1) - hits)  # 0 / 0 is nan


def _classes_at(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the likeliest class of each pixel, (h0, w0) uint8, from logits (classes, h, w).

    The logits are interpolated bilinearly, in bands of rows to limit memory.
    """
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
