"""Datasets of images with masks or boxes: random crops for training, whole images for validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mpp.data.decoding.decode import GREY, Box, decode_crop, decode_cut, random_box
from mpp.data.files import read_regular
from mpp.data.jitter import jitter_colours
from mpp.data.labeled_sets import LabeledBatch
from mpp.data.places import MOST_SIDE_PX, Detected, Segmented
from mpp.errors import BadImage, UserError
from mpp.recipe.sections import Decoding
from mpp.rng import Purpose, stream


class DenseDataset(Dataset[LabeledBatch]):
    """Random resized crops of a subset, with their labels. Keys are (position, 0, place in the subset).

    Each crop is a pure function of seed, position and image. A bad image is replaced by the next one of the subset.
    """

    def __init__(
        self,
        data: Segmented | Detected,
        subset: np.ndarray,
        seed: int,
        *,
        size: tuple[int, int],
        scale: tuple[float, float],
        ratio: tuple[float, float],
        flip: float,
        color_jitter: float | None,
        **decoding: Unpack[Decoding],
    ) -> None:
        """Set the images and how they are cropped.

        Args:
            data: Labeled images.
            subset: Numbers of the images to train on.
            seed: Seed of the run.
            size: (H, W) of the crops in pixels.
            scale: Least and greatest area of a crop, as fractions of the image's area.
            ratio: Least and greatest aspect of a crop (width over height).
            flip: Probability of a horizontal flip.
            color_jitter: Strength of random changes of brightness, contrast and saturation. None means no changes.
            **decoding: Decoding settings, see `decode_cut`.
        """
        self.data, self.subset, self.seed, self.decoding = data, subset, seed, decoding
        self.size, self.scale, self.ratio, self.flip, self.color_jitter = size, scale, ratio, flip, color_jitter

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> LabeledBatch | UserError:
        try:
            samples = [self._sample(position, place) for position, _, place in keys]
        except UserError as error:
            return error
        images, labels, passed_over = zip(*samples, strict=True)
        bad = [line for lines in passed_over for line in lines]
        readable = torch.ones(len(keys), dtype=torch.bool)
        positions = torch.tensor([k[0] for k in keys])
        replaced = sum(map(bool, passed_over))
        return LabeledBatch(torch.stack(images), _together(labels), positions, readable, bad, replaced)

    def _sample(self, position: int, place: int) -> tuple[Tensor, object, list[str]]:
        """Return a crop, its labels, and a line for each unreadable image that it replaces."""
        bad: list[str] = []
        for step in range(len(self.subset)):
            number = int(self.subset[(place + step) % len(self.subset)])
            rng = stream(self.seed, Purpose.AUGMENT, position)
            flip = rng.random() < self.flip  # drawn first, because a crop takes a varying number of draws
            chosen: list[Box] = []

            def box(
                width: int,
                height: int,
                number: int = number,
                rng: np.random.Generator = rng,
                chosen: list[Box] = chosen,
            ) -> Box:
                self.data.check(number, width, height)
                chosen.append(random_box(rng, width, height, self.scale, self.ratio))
                return chosen[-1]

            try:
                image = decode_crop(read_regular(self.data.images[number]), box, self.size, **self.decoding)
                labels = self.data.cropped(number, chosen[-1], self.size, flip)
            except BadImage as error:
                bad.append(f"{self.data.images[number]}: {error}")
                continue
            if self.color_jitter:
                image = jitter_colours(image, rng, self.color_jitter)
            return (image.flip(-1) if flip else image), labels, bad
        raise UserError("data.train: not one of the chosen images can be read; the last: " + bad[-1])


class WholeDataset(Dataset[LabeledBatch]):
    """Whole images with their labels, for evaluation. Keys are numbers of images. Unreadable images are left out.

    Args:
        data: Labeled images.
        fit: Function that returns the scaled size (h, w) for the size (h, w) of an image.
        size: (H, W) of a grey canvas with the image in its upper left corner. None means no canvas, and a list of
            images.
        **decoding: Decoding settings, see `decode_cut`.
    """

    def __init__(
        self,
        data: Segmented | Detected,
        fit: Callable[[int, int], tuple[int, int]],
        size: tuple[int, int] | None,
        **decoding: Unpack[Decoding],
    ) -> None:
        self.data, self.fit, self.size, self.decoding = data, fit, size, decoding

    def __getitems__(self, keys: list[int]) -> LabeledBatch | UserError:
        images, labels = list[Tensor](), []
        readable, bad = torch.ones(len(keys), dtype=torch.bool), []
        for i, number in enumerate(keys):
            name = self.data.images[number]
            try:
                image = whole_image(read_regular(name), **self.decoding)
                h, w = int(image.shape[1]), int(image.shape[2])
                self.data.check(number, w, h)
                scaled = scaled_to(image, within(self.fit(h, w), self.decoding["max_image_pixels"]))
                labels.append(self.data.whole(number, scaled.shape[2] / w, (h, w)))
            except BadImage as error:
                readable[i] = False
                bad.append(f"{name}: {error}")
                continue
            images.append(scaled if self.size is None else on_canvas(scaled, self.size))
        together = images if self.size is None or not images else torch.stack(images)
        return LabeledBatch(together, labels, torch.tensor(keys), readable, bad)


def whole_image(data: bytes, **decoding: Unpack[Decoding]) -> Tensor:
    """Decode a whole image, (C, h, w) uint8, or float32 in [0, 255] with `value_range`.

    Raises:
        BadImage: If it cannot be decoded.
    """
    whole = (MOST_SIDE_PX, MOST_SIDE_PX)  # so that no JPEG is decoded at a fraction of its size
    return decode_cut(data, lambda width, height: (0, 0, width, height), whole, **decoding).pixels


def scaled_to(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image, (C, h, w) with values in [0, 255], to `size`, (H, W)."""
    if tuple(image.shape[1:]) == size:
        return image
    resized = F.resize(image, list(size), InterpolationMode.BICUBIC)
    return resized if resized.dtype == torch.uint8 else resized.clamp_(0, 255)  # uint8 is already in this range


def on_canvas(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Put an image into the upper left corner of a grey image of `size`, (H, W)."""
    canvas = torch.full((image.shape[0], *size), GREY, dtype=image.dtype)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def fit_shorter_side(side_px: int, window: tuple[int, int]) -> Callable[[int, int], tuple[int, int]]:
    """Return a function that scales a size (h, w) to this shorter side, and to at least the window (H, W)."""

    def fit(h: int, w: int) -> tuple[int, int]:
        scale = max(side_px / min(h, w), window[0] / h, window[1] / w)
        return max(round(h * scale), window[0]), max(round(w * scale), window[1])

    return fit


def fit_inside(size: tuple[int, int]) -> Callable[[int, int], tuple[int, int]]:
    """Return a function that scales a size (h, w) to the largest one with the same aspect within `size`, (H, W)."""

    def fit(h: int, w: int) -> tuple[int, int]:
        scale = min(size[0] / h, size[1] / w)
        return max(round(h * scale), 1), max(round(w * scale), 1)

    return fit


def within(size: tuple[int, int], max_image_pixels: int) -> tuple[int, int]:
    """Check that a scaled image is not too large, and return its size. Narrow images may become large when scaled.

    Raises:
        BadImage: If it has more than `max_image_pixels`.
    """
    if size[0] * size[1] > max_image_pixels:
        raise BadImage(f"{size[1]}×{size[0]} pixels once it is scaled, over max_image_pixels {max_image_pixels}")
    return size


def _together(labels: Sequence[Any]) -> Any:
    return torch.stack(list(labels)) if isinstance(labels[0], Tensor) else list(labels)
