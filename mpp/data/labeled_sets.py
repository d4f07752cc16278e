"""Datasets of labeled images: augmented for training, centre-cropped for validation."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mpp.data.centre_crops import CentreCrops
from mpp.data.decoding.decode import decode_pillow
from mpp.data.labeled import Labeled
from mpp.errors import BadImage, UserError
from mpp.recipe.flat import JsonObject
from mpp.recipe.sections import Decoding, Reading
from mpp.rng import Purpose, stream, torch_seed

Images: TypeAlias = Any
"""Images of a batch, see `LabeledBatch.images`: a tensor, or a list of tensors."""
Labels: TypeAlias = Any
"""Labels of a batch, see `LabeledBatch.labels`: a tensor, or tensors in lists and dictionaries."""


@dataclass
class LabeledBatch:
    """One micro-batch of labeled images."""

    images: Images
    """(B, C, H, W), or (B, 5, C, H, W) for the crops of ten views, or a list of (C, h, w) for whole images.

    The type is uint8, or float32 in [0, 255] for images with a value range.
    """
    labels: Labels
    """Labels, by task:

    * classes: (B,) int64, or (B, classes) float32 if an image may have several
    * masks: (B, H, W) uint8, or a list of (h, w) for whole images
    * boxes: one dictionary of tensors for each image
    """
    positions: Tensor
    """(B,) int64: positions in the run, or numbers of the images in evaluation."""
    readable: Tensor
    """(B,) bool: False for an unreadable image. Its pixels are zeros, or it is left out of a list of whole images."""
    bad: list[str]
    """A line for each file that could not be read."""
    replaced: int = 0
    """Number of training images that were replaced by another one."""
    strong: Tensor | None = None
    """(U, C, H, W): strong views of the unlabeled images, in the type of `images`; None if there are none."""
    weak: Tensor | None = None
    """(U, C, H, W): weak views of the same unlabeled images; None if they are not requested."""

    def tensors_by(self, act: Callable[[Tensor], Tensor]) -> LabeledBatch:
        """Replace each tensor of images, labels and views by the result of `act`. The rest stays on the host."""
        self.images, self.labels = _each(self.images, act), _each(self.labels, act)
        self.strong = None if self.strong is None else act(self.strong)
        self.weak = None if self.weak is None else act(self.weak)
        return self

    def pin_memory(self) -> LabeledBatch:
        return self.tensors_by(Tensor.pin_memory)

    def to_keep(self) -> tuple[JsonObject, None]:
        """Return the tensors by name, from which `mpp replay` repeats the batch, and None: no unit is hidden."""
        tensors = {"images": self.images, "labels": self.labels}
        tensors |= {key: view for key, view in (("strong", self.strong), ("weak", self.weak)) if view is not None}
        return tensors | {"positions": self.positions, "readable": self.readable}, None


def _each(value: Any, act: Callable[[Tensor], Tensor]) -> Any:
    """Return the same lists and dictionaries, with `act` applied to every tensor."""
    if isinstance(value, Tensor):
        return act(value)
    if isinstance(value, dict):
        return {key: _each(inner, act) for key, inner in value.items()}
    return [_each(inner, act) for inner in value] if isinstance(value, list) else value


class LabeledDataset(Dataset[LabeledBatch]):
    """Augmented training images of a subset. Keys are (position, 0, place in the subset).

    A bad image is replaced by the next one of the subset.

    Args:
        data: Labeled images.
        subset: Numbers of the images to train on.
        augment: Function from a PIL image to (C, H, W) uint8. It may draw from the global generators of Python, numpy
            and torch, as timm's transforms do: they are seeded for each sample from (seed, position). If `decoding` has
            a `value_range`, the function is called with (bytes, generator) and returns (C, H, W) float32.
        seed: Seed of the run.
        **decoding: Decoding settings, see `decode_cut`.
    """

    def __init__(
        self, data: Labeled, subset: np.ndarray, augment: Callable[..., Tensor], seed: int, **decoding: Unpack[Decoding]
    ) -> None:
        self.data, self.subset, self.augment, self.seed, self.decoding = data, subset, augment, seed, decoding

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> LabeledBatch | UserError:
        try:
            samples = [self._sample(position, place) for position, _, place in keys]
        except UserError as error:
            return error
        images, numbers, passed_over = zip(*samples, strict=True)
        readable = torch.ones(len(keys), dtype=torch.bool)
        positions = torch.tensor([k[0] for k in keys])
        labels, bad = _of(self.data, list(numbers)), [line for lines in passed_over for line in lines]
        return LabeledBatch(torch.stack(images), labels, positions, readable, bad, sum(map(bool, passed_over)))

    def _sample(self, position: int, place: int) -> tuple[Tensor, int, list[str]]:
        """Return an augmented image, its number, and a line for each unreadable image that it replaces."""
        bad: list[str] = []
        for step in range(len(self.subset)):
            number = int(self.subset[(place + step) % len(self.subset)])
            try:
                data = self.data.reader.read(number)
                image = augment_image(data, self.augment, self.seed, Purpose.AUGMENT, position, self.decoding)
                return image, number, bad
            except BadImage as error:
                bad.append(f"{self.data.reader.name(number)}: {error}")
        raise UserError("data.train: not one of the chosen images can be read; the last: " + bad[-1])


def augment_image(
    data: bytes, augment: Callable[..., Tensor], seed: int, purpose: Purpose, position: int, decoding: Decoding
) -> Tensor:
    """Decode and augment an image. The result depends only on its bytes and (seed, purpose, position).

    Args:
        data: Bytes of a file.
        augment: Augmentation, see `LabeledDataset`.
        seed: Seed of the run.
        purpose: Purpose of the draw.
        position: Position of the sample in the run.
        decoding: Decoding settings, see `decode_cut`.

    Raises:
        BadImage: If the bytes cannot be decoded.
    """
    if "value_range" in decoding:
        return augment(data, stream(seed, purpose, position))
    reading: Reading = decoding
    image = decode_pillow(data, **reading)
    drawn = torch_seed(seed, purpose, position)
    random.seed(drawn)
    np.random.seed(drawn % 2**32)
    torch.default_generator.manual_seed(drawn)  # torch.manual_seed also seeds every device, which takes 0.6 ms
    return torch.as_tensor(augment(image))


def _of(data: Labeled, numbers: list[int]) -> Tensor:
    """Return the labels of these images as a tensor."""
    labels = torch.from_numpy(data.labels[numbers])
    return labels.float() if data.several else labels


class CentreDataset(Dataset[LabeledBatch]):
    """Central crops for evaluation. Keys are numbers of images.

    Args:
        data: Labeled images.
        size: (H, W) of the crops.
        fraction: Side of the crop, see `CentreCrops`.
        **how: Other arguments of `CentreCrops`.
    """

    def __init__(self, data: Labeled, size: tuple[int, int], fraction: float, **how: Any) -> None:
        self.data, self.crops = data, CentreCrops(data.reader, size, fraction, **how)

    def __getitems__(self, keys: list[int]) -> LabeledBatch | UserError:
        crops = self.crops.__getitems__(keys)
        if isinstance(crops, UserError):
            return crops
        return LabeledBatch(crops.images, _of(self.data, keys), torch.tensor(keys), crops.readable, crops.bad)
