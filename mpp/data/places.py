"""Images whose labels are places: segmentation masks or boxes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mpp.data.decoding.decode import Box
from mpp.data.readers import FileReader, file_size
from mpp.data.subsets import draw_fraction
from mpp.data.walk import LeftOut
from mpp.errors import BadImage, one_line

CLASSES = "classes.txt"
MOST_SIDE_PX = 1_000_000
"""Of an image, in annotations (a guess)."""
MOST_OUTSIDE_PX = 1
"""By which a box may run past its image, from rounding."""
LEAST_VISIBLE = 0.25
"""A box of which a crop leaves less is no longer one (guess)."""


@dataclass(frozen=True)
class _Dense:
    """Images, and the classes of their places."""

    images: list[str]
    classes: list[str]
    left_out: LeftOut = field(default_factory=LeftOut, compare=False, kw_only=True)
    """Files that are neither images nor masks, and annotations that have no pixel of their image"""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def reader(self) -> FileReader:
        return FileReader(self.images)

    @property
    def strata(self) -> np.ndarray:
        """(images,) int64, what a part held out is stratified by: nothing."""
        return np.zeros(len(self.images), dtype=np.int64)

    def class_of_each(self) -> np.ndarray | None:
        """None: an image may show several classes, or none."""
        return None

    def subset(self, *, labels_per_class: int | None, fraction: float | None, seed: int) -> np.ndarray:
        """Numbers of the images to train on, ascending."""
        return draw_fraction(len(self.images), fraction, seed)


@dataclass(frozen=True)
class Segmented(_Dense):
    """Images with a mask each: PNG files of one channel, whose values are class numbers."""

    masks: list[str]
    pixels: np.ndarray
    """(images, classes) int64: pixels of each class"""
    ignored: int = 0
    """Pixels with the value that counts for nothing"""

    def fingerprint(self) -> str:
        """What the images and their labels are, not where they lie."""
        words = (*self.classes, *(f"{os.path.basename(p)}:{file_size(p)}" for p in (*self.images, *self.masks)))
        return hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape") + self.pixels.tobytes()).hexdigest()

    def check(self, i: int, width: int, height: int) -> None:
        """Sizes were compared when the data was opened."""

    def cropped(self, i: int, box: Box, size: tuple[int, int], flip: bool) -> Tensor:
        """Return the mask of a crop, (H, W) uint8.

        Raises:
            BadImage: It cannot be read.
        """
        left, top, w, h = box
        mask = torch.from_numpy(read_mask(self.masks[i]))
        cut = F.resized_crop(mask[None], top, left, h, w, list(size), InterpolationMode.NEAREST_EXACT)[0]
        return cut.flip(-1) if flip else cut

    def whole(self, i: int, scale: float, size: tuple[int, int]) -> Tensor:
        """Return the mask of a file, (h, w) uint8.

        Raises:
            BadImage: It cannot be read.
        """
        return torch.from_numpy(read_mask(self.masks[i]))


@dataclass(frozen=True)
class Detected(_Dense):
    """Images with boxes, from an annotation file in COCO's format."""

    sizes: list[tuple[int, int] | None]
    """(width, height) that the annotations state, or else the file's header."""
    boxes: list[np.ndarray]
    """(n, 5) float32 of each image: x0, y0, x1, y1 in pixels, area"""
    labels: list[np.ndarray]
    """(n, 2) int64 of each image: class, whether it stands for a crowd"""
    cut: list[str] = field(default_factory=list, compare=False)
    """Where the boxes are that run past their image: they were cut off at its edge"""

    def fingerprint(self) -> str:
        """What the images and their labels are, not where they lie."""
        words = (*self.classes, *(f"{os.path.basename(p)}:{file_size(p)}" for p in self.images))
        digest = hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape"))
        for boxes, labels in zip(self.boxes, self.labels, strict=True):
            digest.update(boxes.tobytes() + labels.tobytes() + b"\0")
        return digest.hexdigest()

    def check(self, i: int, width: int, height: int) -> None:
        """Check that the file has the size that its boxes were drawn on.

        Raises:
            BadImage: It has not.
        """
        stated = self.sizes[i]
        if stated is not None and stated != (width, height):
            raise BadImage(f"{width}×{height} pixels upright, its annotations say {stated[0]}×{stated[1]}")

    def cropped(self, i: int, box: Box, size: tuple[int, int], flip: bool) -> dict[str, Tensor]:
        """boxes (n, 4) float32 in the crop's pixels, labels (n,) int64; crowds and what is hardly visible left out."""
        left, top, w, h = box
        there = torch.from_numpy(self.boxes[i][:, :4].copy())
        kind, crowd = torch.from_numpy(self.labels[i].copy()).unbind(1)
        before = (there[:, 2] - there[:, 0]) * (there[:, 3] - there[:, 1])
        there = there - torch.tensor([left, top, left, top])
        there = there.clamp_min(0).minimum(torch.tensor([w, h, w, h], dtype=torch.float32))
        sides = there[:, 2:] - there[:, :2]
        scale = torch.tensor([size[1] / w, size[0] / h])
        # a detector's boxes are a pixel at least
        kept = (sides.prod(1) >= LEAST_VISIBLE * before) & (sides * scale >= 1).all(1) & (crowd == 0)
        there = there[kept] * scale.repeat(2)
        if flip:
            there = torch.stack([size[1] - there[:, 2], there[:, 1], size[1] - there[:, 0], there[:, 3]], 1)
        return {"boxes": there, "labels": kind[kept]}

    def whole(self, i: int, scale: float, size: tuple[int, int]) -> dict[str, Tensor]:
        """boxes in the file's pixels, labels, iscrowd, area; how the image was scaled, and its size (h, w)."""
        kind, crowd = torch.from_numpy(self.labels[i].copy()).unbind(1)
        return {
            "boxes": torch.from_numpy(self.boxes[i][:, :4].copy()),
            "labels": kind,
            "iscrowd": crowd,
            "area": torch.from_numpy(self.boxes[i][:, 4].copy()),
            "scale": torch.tensor(scale),
            "size": torch.tensor(size),
        }


def size_of(image: str) -> tuple[int, int] | None:
    """(width, height) by its header, upright; None for a bad image, which training passes over and counts."""
    try:
        with Image.open(image) as opened:
            width, height = opened.size
            # of TIFFs Pillow has the size upright already
            turned = opened.format != "TIFF" and opened.getexif().get(0x0112, 1) >= 5
            return (height, width) if turned else (width, height)
    except Exception:  # decoders raise anything on hostile bytes
        return None


def read_mask(path: str) -> np.ndarray:
    """Read a mask, (h, w) uint8.

    Raises:
        BadImage: It cannot be read as one.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(26)
        if len(start) < 26:
            raise BadImage(f"a file of {len(start)} bytes, not a PNG")
        depth, colours = start[24:26]
        with Image.open(path, formats=("PNG",)) as mask:
            if mask.mode not in ("L", "P", "1"):
                raise BadImage(f"a mask has one channel of class numbers; this PNG is {mask.mode}")
            # Pillow spreads grey of 2 and 4 bits over 0 to 255
            return np.array(mask, dtype=np.uint8) // ({2: 85, 4: 17}.get(depth, 1) if colours == 0 else 1)
    except BadImage:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        raise BadImage(f"not a PNG that can be read: {one_line(error) or type(error).__name__}") from error
