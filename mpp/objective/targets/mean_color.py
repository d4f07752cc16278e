"""The mean colour of a cell in 3 bits a channel, 512 classes (ViT, Dosovitskiy et al. 2021, appendix B.1.2)."""

from __future__ import annotations

from torch import Tensor

from mpp.data.batch import Images
from mpp.encoders.cells import unpatchify
from mpp.objective.colours import colour_classes, colour_parts, count_colours, marginal_logits, mean_patches
from mpp.objective.interfaces import Target, TargetContext
from mpp.recipe.values import PositiveInt


class MeanColorTarget(Target):
    """Predict one class for each cell: its binned mean colour, not normalised.

    Args:
        bits: Number of bits per channel (paper: 3, which gives 512 classes for 3 channels). At most 65,536 classes.
    """

    of = "classes"

    def __init__(self, context: TargetContext, *, bits: PositiveInt = 3) -> None:
        super().__init__()
        self.bits, self.channels, self.cell_px = bits, context.channels, context.cell_px
        self.dim = self.classes = count_colours(bits, context.channels)

    def forward(self, images: Images) -> Tensor:
        return colour_classes(mean_patches(images.raw, self.cell_px, 1), self.bits)

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """Return the log frequencies of classes over the visible cells of all images."""
        return marginal_logits(self(images), hidden, self.classes)

    def picture(self, prediction: Tensor, images: Images, hidden: Tensor, *, borrow: bool) -> Tensor | None:
        """Draw each cell in the colour in the middle of its most likely bin."""
        parts = colour_parts(prediction, self.bits, self.channels, 1, self.cell_px)
        picture = unpatchify(parts, self.cell_px, (hidden.shape[1], hidden.shape[2]))
        return (picture - images.mean) / images.std
