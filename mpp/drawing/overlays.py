"""Classes of pixels, and boxes, drawn over images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from mpp.drawing.plots import gallery

OPACITY = 0.6
"""Of the colours over the image."""
LEAST_SCORE = 0.3
"""Boxes with less are not drawn: a detector lists a hundred (guess)."""
MOST_NAMED = 20
"""Classes in a legend."""


def colours(count: int) -> Tensor:
    """(count, 3) uint8: hues a golden angle apart, so that neighbours differ however many there are."""
    rgb = [colorsys.hsv_to_rgb(0.02 + 0.618034 * i % 1, 0.85, (1.0, 0.75)[i // 8 % 2]) for i in range(count)]
    return (255 * torch.tensor(rgb)).round().to(torch.uint8)


def over_pixels(image: Tensor, classes: Tensor, of: int, ignored: Tensor | None = None) -> Tensor:
    """Draw classes over an image.

    Args:
        image: (C, h, w) uint8.
        classes: (h, w) int64.
        of: How many classes there are.
        ignored: (h, w) bool, drawn black.

    Returns:
        (3, h, w) uint8.
    """
    hidden = torch.zeros(classes.shape, dtype=torch.bool) if ignored is None else ignored
    colour = colours(of)[classes.long().masked_fill(hidden, 0)].permute(2, 0, 1)
    grey = _rgb(image).float().mean(0, keepdim=True)  # colours below would change those above
    mixed = (1 - OPACITY) * grey + OPACITY * colour.float()
    return mixed.masked_fill(hidden, 0).round().to(torch.uint8)


def over_boxes(image: Tensor, boxes: Tensor, labels: Tensor, classes: Sequence[str]) -> Tensor:
    """Draw boxes over an image.

    Args:
        image: (C, h, w) uint8.
        boxes: (n, 4) in its pixels.
        labels: (n,) int64.
        classes: Their names.

    Returns:
        (3, h, w) uint8.
    """
    if len(boxes) == 0:
        return _rgb(image)
    chosen = [tuple(c) for c in colours(len(classes))[labels].tolist()]
    return draw_bounding_boxes(_rgb(image), boxes, colors=chosen, width=max(round(max(image.shape[1:]) / 100), 1))


def show(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]], classes: Sequence[str], out: Path, *, extra: str | None = None
) -> None:
    """Draw images with truth and prediction over them, and a legend.

    Args:
        rows: (image, truth, prediction), (3, h, w) uint8 each.
        classes: Their names, for the legend.
        out: A PNG.
        extra: What black stands for.

    Raises:
        UserError: `out` cannot be written.
    """
    pictures = [
        (picture, caption) for row in rows for picture, caption in zip(row, ("image", "true", "said"), strict=True)
    ]
    named = list(zip(classes, colours(len(classes)).tolist(), strict=True))[:MOST_NAMED]
    gallery(pictures, out, legend=[*named, *([(extra, [0, 0, 0])] if extra else [])])


def _rgb(image: Tensor) -> Tensor:
    return image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
