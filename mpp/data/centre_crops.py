"""A dataset of central crops of images, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mpp.data.decoding.decode import decode_crop, view_boxes
from mpp.data.readers import Reader
from mpp.errors import BadImage, UserError
from mpp.recipe.sections import Decoding


@dataclass
class Crops:
    """Crops of a batch of images."""

    images: Tensor
    """(B, C, H, W), or (B, 5, C, H, W) for ten views; uint8, or float32 in [0, 255] for images with a value range."""
    readable: Tensor
    """(B,) bool: False for an unreadable image, whose pixels are zeros."""
    bad: list[str]
    """A line for each image that could not be read."""

    def pin_memory(self) -> Crops:
        self.images = self.images.pin_memory()
        return self


class CentreCrops(Dataset[Crops]):
    """Central crops of images. Keys are numbers of images.

    Args:
        reader: Reader of the images.
        size: (H, W) of the crops.
        fraction: Side of the crop, as a fraction of the largest box with this aspect.
        views: Number of views. 1 and 2 give (B, C, H, W). 10 also gives the corners, (B, 5, C, H, W). Mirror images are
            made later, on the model's device.
        **decoding: Decoding settings, see `decode_cut`.
    """

    def __init__(
        self, reader: Reader, size: tuple[int, int], fraction: float, *, views: int = 1, **decoding: Unpack[Decoding]
    ) -> None:
        self.reader, self.size, self.boxes = reader, size, view_boxes(views, size, fraction)
        self.decoding = decoding

    def __getitems__(self, keys: list[int]) -> Crops | UserError:
        shape = (len(keys), len(self.boxes), self.decoding["channels"], *self.size)
        images = torch.zeros(shape, dtype=torch.float32 if "value_range" in self.decoding else torch.uint8)
        readable, bad = torch.ones(len(keys), dtype=torch.bool), []
        for i, number in enumerate(keys):
            try:
                data = self.reader.read(number)
                for view, box in enumerate(self.boxes):
                    images[i, view] = decode_crop(data, box, self.size, **self.decoding)
            except BadImage as error:
                images[i], readable[i] = 0, False
                bad.append(f"{self.reader.name(number)}: {error}")
            except UserError as error:
                return error
        return Crops(images[:, 0] if len(self.boxes) == 1 else images, readable, bad)
