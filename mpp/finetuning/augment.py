"""Augmentation of labeled images by timm. Images that do not have 8 bits are only cropped and flipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image, ImageOps
from timm.data import create_transform

from mpp.data.crop import Crop
from mpp.errors import UserError
from mpp.recipe.finetune import FinetuneData


def make_augmentation(data: FinetuneData, *, key: str = "data.auto_augment") -> Callable[..., Any]:
    """Return the augmentation of training images, for `LabeledDataset`.

    Args:
        data: Section `data` of the recipe.
        key: Recipe key that names the policy, for messages.

    Returns:
        The training transform of timm, PIL image -> (C, H, W) uint8. For images that do not have 8 bits, a function
        (bytes, generator) -> (C, H, W) float32.

    Raises:
        UserError: If timm does not know the policy, or the policy does not support this number of channels.
    """
    if not data.eight_bit:
        reading = data.decoding()
        return Crop(data.image_size, scale=data.crop_scale, ratio=data.crop_ratio, flip=data.flip, **reading).random
    if data.auto_augment and data.channels != 3:
        raise UserError(
            f"{key}: its policies are for 3 channels, of which data has {data.channels}; null leaves it out"
        )
    try:
        transform = create_transform(
            (data.channels, *data.image_size),
            is_training=True,
            use_prefetcher=True,  # returns uint8, because images are normalised on the device
            scale=data.crop_scale,
            ratio=data.crop_ratio,
            hflip=data.flip,
            color_jitter=data.color_jitter,  # type: ignore[arg-type]  # None turns it off, although timm's type lacks it
            auto_augment=data.auto_augment,
            interpolation="bicubic",
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        known = "rand-m9-mstd0.5-inc1, augmix-m3-w3, 3a, v0 and the like"
        raise UserError(f"{key}: timm has no policy {data.auto_augment!r}; expected {known}") from error
    for step in transform.transforms:
        for op in [*getattr(step, "ops", []), *(op for ops in getattr(step, "policy", []) for op in ops)]:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterized
    return transform


def _posterized(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Return an image with `bits` bits per channel. 0 bits give a black image.

    timm's strongest setting is 0 bits, which Pillow refuses since version 13.
    """
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
