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
    """(C, h, w) uint8 and (h, w) classes -> (3, h, w) uint8, black where `ignored`."""
    hidden = torch.zeros(classes.shape, dtype=torch.bool) if ignored is None else ignored
    colour = colours(of)[classes.long().masked_fill(hidden, 0)].permute(2, 0, 1)
    grey = _rgb(image).float().mean(0, keepdim=True)  # colours below would change those above
    mixed = (1 - OPACITY) * grey + OPACITY * colour.float()
    return mixed.masked_fill(hidden, 0).round().to(torch.uint8)


def over_boxes(image: Tensor, boxes: Tensor, labels: Tensor, classes: Sequence[str]) -> Tensor:
    """(C, h, w) uint8, (n, 4) in its pixels and (n,) -> (3, h, w) uint8."""
    if len(boxes) == 0:
        return _rgb(image)
    chosen = [tuple(c) for c in colours(len(classes))[labels].tolist()]
    return draw_bounding_boxes(_rgb(image), boxes, colors=chosen, width=max(round(max(image.shape[1:]) / 100), 1))


def show(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]], classes: Sequence[str], out: Path, *, extra: str | None = None
) -> None:
    """Images with truth and prediction drawn over them, and a legend. extra: what black stands for."""
    pictures = [
        (picture, caption) for row in rows for picture, caption in zip(row, ("image", "true", "said"), strict=True)
    ]
    named = list(zip(classes, colours(len(classes)).tolist(), strict=True))[:MOST_NAMED]
    gallery(pictures, out, legend=[*named, *([(extra, [0, 0, 0])] if extra else [])])


def _rgb(image: Tensor) -> Tensor:
    return image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
