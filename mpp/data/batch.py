"""What the loader hands to the model: `Batch` and its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


@dataclass
class Batch:
    """One micro-batch of pretraining, as the loader's workers make it."""

    images: Tensor
    """(B, C, H, W) uint8, cropped and flipped, not normalised; float32 in [0, 255] for images with a value range."""
    mask: Tensor
    """(B, uh, uw) bool."""
    noise: Tensor
    """(B, 4, uh, uw) float32 in [0, 1), see `NOISE`: whatever else is drawn per mask unit is derived from it."""
    positions: Tensor
    """(B,) int64: place of each sample in the run's endless sequence."""
    samples: Tensor
    """(B, 2) int64: (shard, row) of each sample."""
    hidden_units: int
    """Mask units hidden in each image, a plain int so that no device has to be asked."""
    replaced: int = 0
    """Samples whose image could not be read and was replaced by a neighbour."""
    bad: list[str] = field(default_factory=list)
    """One line for each image that could not be read; a search for a neighbour may meet several."""

    def tensors_by(self, act: Callable[[Tensor], Tensor]) -> Batch:
        """What the model computes with, replaced by what `act` makes of it; the rest stays with the host."""
        self.images, self.mask, self.noise = act(self.images), act(self.mask), act(self.noise)
        return self

    def pin_memory(self) -> Batch:
        return self.tensors_by(Tensor.pin_memory)


NOISE = {"predict": 0, "kind": 1, "source": 2, "guide": 3}
"""Planes of `Batch.noise`: which hidden units are predicted, what a corruption does to each, whence it copies,
and what a guided mask adds to its guide."""


class Images(NamedTuple):
    """One batch of images, as targets, corruptions and teachers may want them."""

    raw: Tensor
    """(B, C, H, W) uint8."""
    normalised: Tensor
    """(B, C, H, W) float32, (raw / 255 - mean) / std."""
    mean: Tensor
    """(C, 1, 1) of pixels in [0, 1]."""
    std: Tensor
    """(C, 1, 1)"""


@dataclass
class Units:
    """The mask as it was drawn, for corruptions that treat hidden units differently."""

    hidden: Tensor
    """(B, uh, uw) bool."""
    count: int
    """Hidden units of each image, a plain int."""
    noise: Tensor
    """(B, 4, uh, uw), see `NOISE`."""
