"""Make images of any channels and values visible."""

from __future__ import annotations

import torch
from torch import Tensor

DARKEST, BRIGHTEST = 0.01, 0.99
"""Quantiles of the values that are drawn black and white, if values are not those of 8-bit pixels (guess)."""
MOST_VALUES = 2**20
"""About as many values are taken for the quantiles."""


def as_rgb(image: Tensor) -> Tensor:
    """Return an image as three colours: its first three channels, or the first one in grey.

    Images of wider ranges, such as 0 to 65535, often use a small part of it. So their values are stretched.

    Args:
        image: (C, h, w) uint8, or float32 in [0, 255].

    Returns:
        (3, h, w) uint8.
    """
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    if shown.dtype == torch.uint8:
        return shown
    values = shown.flatten()
    low, high = values[:: max(len(values) // MOST_VALUES, 1)].quantile(torch.tensor([DARKEST, BRIGHTEST])).tolist()
    if high == low:
        return shown.round().to(torch.uint8)
    return ((shown - low) * (255 / (high - low))).clamp(0, 255).round().to(torch.uint8)
