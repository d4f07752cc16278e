"""Random and central crops of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpp.data.decoding.decode import Box, centre_box, decode_crop, random_box
from mpp.data.jitter import jitter_colours, remove_colours
from mpp.recipe.sections import ValueRange


@dataclass
class Crop:
    """Settings by which an image is decoded, cropped and flipped into a training sample."""

    size: tuple[int, int]
    """(H, W) in pixels."""
    channels: int
    scale: tuple[float, float]
    """Least and greatest area of a random crop, as fractions of the image's area."""
    ratio: tuple[float, float]
    """Least and greatest aspect of a random crop (width over height)."""
    flip: float
    """Probability of a horizontal flip."""
    formats: tuple[str, ...]
    max_image_pixels: int
    value_range: ValueRange | None = None
    """Values that become 0 and 255, for images that are not read as 8 bit."""
    nodata: float | None = None
    """Value that marks missing pixels in images with a `value_range`."""
    color_jitter: float = 0.0
    """Strength of random changes of brightness, contrast and saturation, for images of 8 bit."""
    grayscale: float = 0.0
    """Probability that an image of 8 bit loses its colours."""

    def random(self, data: bytes, rng: np.random.Generator) -> Tensor:
        """Return a random crop, (C, H, W), flipped at random and with random colours. `rng` is that of the sample."""
        flip = rng.random() < self.flip  # drawn first, because a crop takes a varying number of draws
        image = self._decode(data, lambda w, h: random_box(rng, w, h, self.scale, self.ratio))
        if self.color_jitter:
            image = jitter_colours(image, rng, self.color_jitter)
        if self.grayscale and rng.random() < self.grayscale:
            image = remove_colours(image)
        return image.flip(-1) if flip else image

    def centre(self, data: bytes) -> Tensor:
        """Return the largest centred crop, (C, H, W), in the type `dtype`."""
        return self._decode(data, lambda w, h: centre_box(w, h, self.size))

    def _decode(self, data: bytes, choose_box: Callable[[int, int], Box]) -> Tensor:
        return decode_crop(
            data,
            choose_box,
            self.size,
            channels=self.channels,
            formats=self.formats,
            max_image_pixels=self.max_image_pixels,
            value_range=self.value_range,
            nodata=self.nodata,
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.value_range is None else torch.float32
