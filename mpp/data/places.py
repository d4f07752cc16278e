"""Images whose labels refer to places in the image: segmentation masks or boxes."""

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
"""Greatest side of an image in annotations (a guess)."""
MOST_OUTSIDE_PX = 1
"""Pixels by which a box may extend beyond its image because of rounding."""
LEAST_VISIBLE = 0.25
"""Least share of a box's area that must be inside a crop; otherwise the box is dropped (guess)."""


@dataclass(frozen=True)
class _Dense:
    """Images, and the classes of the things in them."""

    images: list[str]
    classes: list[str]
    left_out: LeftOut = field(default_factory=LeftOut, compare=False, kw_only=True)
    """Files that are neither images nor masks, and boxes that cover no pixel of their image."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def reader(self) -> FileReader:
        return FileReader(self.images)

    @property
    def strata(self) -> np.ndarray:
        """Stratum of each image for a held-out split, (images,) int64: all are 0, so nothing is stratified."""
        return np.zeros(len(self.images), dtype=np.int64)

    def class_of_each(self) -> np.ndarray | None:
        """Return None, because an image may show several classes, or none."""
        return None

    def subset(self, *, labels_per_class: int | None, fraction: float | None, seed: int) -> np.ndarray:
        """Return the numbers of the images to train on, ascending. `labels_per_class` is ignored."""
        return draw_fraction(len(self.images), fraction, seed)


@dataclass(frozen=True)
class Segmented(_Dense):
    """Images with one mask each: PNG files with one channel, whose values are class numbers."""

    masks: list[str]
    pixels: np.ndarray
    """(images, classes) int64: number of pixels of each class."""
    mask_sizes: list[tuple[int, int]] = field(compare=False)
    """(width, height) of each mask."""
    ignored: int = 0
    """Number of pixels with the value that is ignored."""

    def fingerprint(self) -> str:
        """Return a hash of the images and their labels. Their location does not change it."""
        words = (*self.classes, *(f"{os.path.basename(p)}:{file_size(p)}" for p in (*self.images, *self.masks)))
        return hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape") + self.pixels.tobytes()).hexdigest()

    def check(self, i: int, width: int, height: int) -> None:
        """Check that an image has the size of its mask. When the data is opened, not every size can be read.

        Raises:
            BadImage: If it has another size.
        """
        if self.mask_sizes[i] != (width, height):
            there = self.mask_sizes[i]
            raise BadImage(f"{width}×{height} pixels upright, its mask {there[0]}×{there[1]}")

    def cropped(self, i: int, box: Box, size: tuple[int, int], flip: bool) -> Tensor:
        """Return the mask of a crop, (H, W) uint8.

        Raises:
            BadImage: If the mask cannot be read.
        """
        left, top, w, h = box
        mask = torch.from_numpy(read_mask(self.masks[i]))
        cut = F.resized_crop(mask[None], top, left, h, w, list(size), InterpolationMode.NEAREST_EXACT)[0]
        return cut.flip(-1) if flip else cut

    def whole(self, i: int, scale: float, size: tuple[int, int]) -> Tensor:
        """Return the whole mask at the size of its file, (h, w) uint8.

        Raises:
            BadImage: If the mask cannot be read.
        """
        return torch.from_numpy(read_mask(self.masks[i]))


@dataclass(frozen=True)
class Detected(_Dense):
    """Images with boxes, from an annotation file in COCO's format."""

    sizes: list[tuple[int, int] | None]
    """(width, height) of each image, from the annotations or else from the file's header; None if unknown."""
    boxes: list[np.ndarray]
    """(n, 5) float32 for each image: x0, y0, x1, y1 in pixels, area in square pixels."""
    labels: list[np.ndarray]
    """(n, 2) int64 for each image: class, 1 for a crowd or 0."""
    cut: list[str] = field(default_factory=list, compare=False)
    """A line for each box that extends beyond its image by more than MOST_OUTSIDE_PX and was clipped at the edge."""

    def fingerprint(self) -> str:
        """Return a hash of the images and their labels. Their location does not change it."""
        words = (*self.classes, *(f"{os.path.basename(p)}:{file_size(p)}" for p in self.images))
        digest = hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape"))
        for boxes, labels in zip(self.boxes, self.labels, strict=True):
            digest.update(boxes.tobytes() + labels.tobytes() + b"\0")
        return digest.hexdigest()

    def check(self, i: int, width: int, height: int) -> None:
        """Check that an image has the size for which its boxes were drawn.

        Raises:
            BadImage: If it has another size.
        """
        stated = self.sizes[i]
        if stated is not None and stated != (width, height):
            raise BadImage(f"{width}×{height} pixels upright, its annotations say {stated[0]}×{stated[1]}")

    def cropped(self, i: int, box: Box, size: tuple[int, int], flip: bool) -> dict[str, Tensor]:
        """Return the boxes of a crop, (n, 4) float32 in the crop's pixels, and their labels, (n,) int64.

        Crowds are left out, and boxes that are hardly visible.
        """
        left, top, w, h = box
        there = torch.from_numpy(self.boxes[i][:, :4].copy())
        kind, crowd = torch.from_numpy(self.labels[i].copy()).unbind(1)
        before = (there[:, 2] - there[:, 0]) * (there[:, 3] - there[:, 1])
        there = there - torch.tensor([left, top, left, top])
        there = there.clamp_min(0).minimum(torch.tensor([w, h, w, h], dtype=torch.float32))
        sides = there[:, 2:] - there[:, :2]
        scale = torch.tensor([size[1] / w, size[0] / h])
        # detectors require boxes of at least one pixel
        kept = (sides.prod(1) >= LEAST_VISIBLE * before) & (sides * scale >= 1).all(1) & (crowd == 0)
        there = there[kept] * scale.repeat(2)
        if flip:
            there = torch.stack([size[1] - there[:, 2], there[:, 1], size[1] - there[:, 0], there[:, 3]], 1)
        return {"boxes": there, "labels": kind[kept]}

    def whole(self, i: int, scale: float, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return all boxes of an image in the file's pixels.

        The result has boxes, labels, iscrowd, area, the scale of the image, and its size (h, w) before scaling.
        """
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
    """Return (width, height) of the upright image, from its header.

    Return None for a bad image, which training skips and counts, and where Pillow cannot tell the size.
    """
    try:
        with Image.open(image) as opened:
            if opened.format == "TIFF" and getattr(opened, "n_frames", 1) > 1:  # its pages may be rows or channels
                return None
            width, height = opened.size
            # Pillow returns the size of TIFFs already upright
            turned = opened.format != "TIFF" and opened.getexif().get(0x0112, 1) >= 5
            return (height, width) if turned else (width, height)
    except Exception:  # decoders may raise anything on hostile bytes
        return None


def read_mask(path: str) -> np.ndarray:
    """Read a mask, (h, w) uint8.

    Raises:
        BadImage: If it is not a readable PNG with one channel.
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
            # Pillow scales grey of 2 and 4 bits to 0 … 255: divide to restore the class numbers
            return np.array(mask, dtype=np.uint8) // ({2: 85, 4: 17}.get(depth, 1) if colours == 0 else 1)
    except BadImage:
        raise
    except Exception as error:  # decoders may raise anything on hostile bytes
        raise BadImage(f"not a PNG that can be read: {one_line(error) or type(error).__name__}") from error
