"""Draw the classes of pixels, and boxes, over images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from mpp.drawing.pixels import as_rgb
from mpp.drawing.plots import gallery

OPACITY = 0.6
"""Opacity of the colours over the image."""
LEAST_SCORE = 0.3
"""Least score of a box that is drawn, since a detector returns a hundred boxes (guess)."""
MOST_NAMED = 20
"""Most classes in a legend."""


def colours(count: int) -> Tensor:
    """Return (count, 3) uint8 colours. Their hues are a golden angle apart, so that neighbours always differ."""
    rgb = [colorsys.hsv_to_rgb(0.02 + 0.618034 * i % 1, 0.85, (1.0, 0.75)[i // 8 % 2]) for i in range(count)]
    return (255 * torch.tensor(rgb)).round().to(torch.uint8)


def over_pixels(image: Tensor, classes: Tensor, of: int, ignored: Tensor | None = None) -> Tensor:
    """Draw classes over an image.

    Args:
        image: (C, h, w) uint8, or float32 in [0, 255].
        classes: (h, w) int64.
        of: Number of classes.
        ignored: (h, w) bool mask of pixels that are drawn black. None means no pixels.

    Returns:
        (3, h, w) uint8.
    """
    hidden = torch.zeros(classes.shape, dtype=torch.bool) if ignored is None else ignored
    colour = colours(of)[classes.long().masked_fill(hidden, 0)].permute(2, 0, 1)
    grey = as_rgb(image).float().mean(0, keepdim=True)  # the image's own colours would change those of the classes
    mixed = (1 - OPACITY) * grey + OPACITY * colour.float()
    return mixed.masked_fill(hidden, 0).round().to(torch.uint8)


def over_boxes(image: Tensor, boxes: Tensor, labels: Tensor, classes: Sequence[str]) -> Tensor:
    """Draw boxes over an image.

    Args:
        image: (C, h, w) uint8, or float32 in [0, 255].
        boxes: (n, 4) boxes in pixels of the image, (x0, y0, x1, y1).
        labels: (n,) int64 class numbers of the boxes.
        classes: Names of all classes.

    Returns:
        (3, h, w) uint8.
    """
    if len(boxes) == 0:
        return as_rgb(image)
    chosen = [tuple(c) for c in colours(len(classes))[labels].tolist()]
    return draw_bounding_boxes(as_rgb(image), boxes, colors=chosen, width=max(round(max(image.shape[1:]) / 100), 1))


def show(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]], classes: Sequence[str], out: Path, *, extra: str | None = None
) -> None:
    """Draw rows of an image, its truth and its prediction, with a legend of the classes.

    Args:
        rows: (image, truth, prediction) of each row, (3, h, w) uint8 each.
        classes: Names of the classes, for the legend.
        out: PNG file to write.
        extra: Meaning of black in the legend. None means no such entry.

    Raises:
        UserError: If `out` cannot be written.
    """
    pictures = [
        (picture, caption) for row in rows for picture, caption in zip(row, ("image", "true", "predicted"), strict=True)
    ]
    named = list(zip(classes, colours(len(classes)).tolist(), strict=True))[:MOST_NAMED]
    gallery(pictures, out, legend=[*named, *([(extra, [0, 0, 0])] if extra else [])])
