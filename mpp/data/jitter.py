"""Random changes of an image's colours."""

from __future__ import annotations

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor


def jitter_colours(image: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """Multiply brightness, contrast and, for colour images, saturation, in this order, by factors of 1 ± strength.

    Args:
        image: (C, H, W) uint8. A fourth channel is transparency and does not change.
        rng: Generator of the sample.
        strength: Largest deviation of a factor from 1. Factors are never negative.
    """
    changes = [F.adjust_brightness, F.adjust_contrast, *([F.adjust_saturation] if image.shape[0] >= 3 else [])]
    seen, rest = image[:3], image[3:]
    for change in changes:
        seen = change(seen, rng.uniform(max(1 - strength, 0), 1 + strength))
    return torch.cat([seen, rest])


def remove_colours(image: Tensor) -> Tensor:
    """Return a colour image (3 or 4, H, W) with its brightness in all three channels. Others do not change."""
    return image if image.shape[0] < 3 else torch.cat([F.rgb_to_grayscale(image[:3], 3), image[3:]])
