"""What the loader hands to the model: `Batch` and its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

NOISE = {"predict": 0, "kind": 1, "source": 2, "guide": 3}
"""Planes of `Units.noise`: which hidden units are predicted, what a corruption does to each, where it copies from, and
what a guided mask adds to its guide."""


@dataclass
class Units:
    """The mask of a batch as it was drawn, on mask units."""

    hidden: Tensor
    """(B, uh, uw) bool, True where hidden."""
    count: int
    """Hidden units of each image; a plain int, so that no device has to be asked."""
    noise: Tensor
    """(B, 4, uh, uw) float32 in [0, 1), see `NOISE`. Whatever else is drawn for a mask unit is derived from it."""

    def tensors_by(self, act: Callable[[Tensor], Tensor]) -> Units:
        """Return the same with its tensors replaced by what `act` makes of them."""
        return Units(act(self.hidden), self.count, act(self.noise))

    def of(self, images: slice) -> Units:
        """Return the masks of some images."""
        return self.tensors_by(lambda t: t[images])


@dataclass
class Batch:
    """One micro-batch of pretraining, as the loader's workers make it."""

    images: Tensor
    """(B, C, H, W) uint8, cropped and flipped, not normalised; float32 in [0, 255] for images with a value range."""
    units: Units
    positions: Tensor
    """(B,) int64: place of each sample in the run's endless sequence."""
    samples: Tensor
    """(B, 2) int64: (shard, row) of each sample."""
    replaced: int = 0
    """Samples whose image could not be read and was replaced by a neighbour."""
    bad: list[str] = field(default_factory=list)
    """One line for each image that could not be read; a search for a neighbour may meet several."""

    def tensors_by(self, act: Callable[[Tensor], Tensor]) -> Batch:
        """Replace what the model computes with by what `act` makes of each tensor; the rest stays with the host."""
        self.images, self.units = act(self.images), self.units.tensors_by(act)
        return self

    def pin_memory(self) -> Batch:
        return self.tensors_by(Tensor.pin_memory)

    def to_keep(self) -> tuple[dict[str, Tensor], int]:
        """Return tensors by name and the number of hidden units, from which `mpp replay` runs the batch again."""
        tensors = {"images": self.images, "mask": self.units.hidden, "noise": self.units.noise}
        return tensors | {"positions": self.positions, "samples": self.samples}, self.units.count


class Images(NamedTuple):
    """One batch of images, as targets, corruptions and teachers may need them."""

    raw: Tensor
    """(B, C, H, W) uint8."""
    normalised: Tensor
    """(B, C, H, W) float32, (raw / 255 - mean) / std."""
    mean: Tensor
    """(C, 1, 1) of pixels in [0, 1]."""
    std: Tensor
    """(C, 1, 1)"""
