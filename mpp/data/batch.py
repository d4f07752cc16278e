"""Batches that the dataloader passes to the model: `Batch` and its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

NOISE = {"predict": 0, "kind": 1, "source": 2, "guide": 3}
"""Planes of `Units.noise` by name. Each plane decides one thing:

* predict: which hidden units are predicted
* kind: the kind of corruption of each unit
* source: the unit from which a corruption copies
* guide: the noise that a guided mask adds to its guide
"""


@dataclass
class Units:
    """The mask of a batch as it was drawn, on mask units."""

    hidden: Tensor
    """(B·M, uh, uw) bool, True where hidden. The M masks of an image follow each other."""
    count: int
    """Number of hidden units in each mask. A plain int, so that no device has to be synchronised."""
    noise: Tensor
    """(B·M, 4, uh, uw) float32 in [0, 1), see `NOISE`. All other random choices for a mask unit are derived from it."""

    def tensors_by(self, act: Callable[[Tensor], Tensor]) -> Units:
        """Return the same masks with `act` applied to each tensor."""
        return Units(act(self.hidden), self.count, act(self.noise))

    def of(self, masks: slice) -> Units:
        """Return some of the masks. If images have one mask each, these are the masks of some images."""
        return self.tensors_by(lambda t: t[masks])


@dataclass
class Batch:
    """One micro-batch of pretraining, made by the dataloader's workers."""

    images: Tensor
    """(B, C, H, W) uint8, cropped and flipped, not normalised; float32 in [0, 255] for images with a value range."""
    units: Units
    positions: Tensor
    """(B,) int64: position of each sample in the run's endless sequence."""
    samples: Tensor
    """(B, 2) int64: (shard, row) of each sample."""
    replaced: int = 0
    """Number of samples whose image could not be read and was replaced by a neighbour."""
    bad: list[str] = field(default_factory=list)
    """One line for each image that could not be read. The search for one neighbour may add several."""

    def tensors_by(self, act: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `act` to each tensor that the model uses. The rest stays on the host."""
        self.images, self.units = act(self.images), self.units.tensors_by(act)
        return self

    def pin_memory(self) -> Batch:
        return self.tensors_by(Tensor.pin_memory)

    def to_keep(self) -> tuple[dict[str, Tensor], int]:
        """Return tensors by name and the number of hidden units, from which `mpp replay` repeats the batch."""
        tensors = {"images": self.images, "mask": self.units.hidden, "noise": self.units.noise}
        return tensors | {"positions": self.positions, "samples": self.samples}, self.units.count


class Images(NamedTuple):
    """One batch of images in the forms that targets, corruptions and teachers use."""

    raw: Tensor
    """(B, C, H, W) uint8, or float32 in [0, 255] for images with a value range."""
    normalised: Tensor
    """(B, C, H, W) float32, (raw / 255 - mean) / std."""
    mean: Tensor
    """(C, 1, 1): mean of pixels in [0, 1]."""
    std: Tensor
    """(C, 1, 1): standard deviation of pixels in [0, 1]."""

    def repeated(self, times: int) -> Images:
        """Return each image several times in a row, (B·times, C, H, W)."""
        if times == 1:
            return self
        raw, normalised = (pixels.repeat_interleave(times, 0) for pixels in (self.raw, self.normalised))
        return Images(raw, normalised, self.mean, self.std)
