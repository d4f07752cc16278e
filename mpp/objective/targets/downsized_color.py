"""A cell downsized to 4 × 4 colours of 3 bits a channel: 16 predictions of 512 classes (ViT, Dosovitskiy et
al. 2021, appendix B.1.2)."""

from __future__ import annotations

from torch import Tensor

from mpp.data.batch import Images
from mpp.encoders.cells import unpatchify
from mpp.objective.colours import colour_classes, colour_parts, count_colours, marginal_logits, mean_patches
from mpp.objective.interfaces import Target, TargetContext
from mpp.recipe.values import PositiveInt


class DownsizedColorTarget(Target):
    """Predict `side` × `side` colour classes for each cell: the binned mean colours of its parts, not normalised.

    Args:
        side: Number of parts along each side of a cell (paper: 4). It must divide the cell's side in pixels.
        bits: Number of bits per channel (paper: 3). At most 65,536 classes.
    """

    of = "classes"

    def __init__(self, context: TargetContext, *, side: PositiveInt = 4, bits: PositiveInt = 3) -> None:
        super().__init__()
        if context.cell_px % side:
            raise ValueError(f"side: must divide the cell, {context.cell_px} px; got {side}")
        self.side, self.bits, self.channels, self.cell_px = side, bits, context.channels, context.cell_px
        self.classes = count_colours(bits, context.channels)
        self.dim = side * side * self.classes

    def forward(self, images: Images) -> Tensor:
        return colour_classes(mean_patches(images.raw, self.cell_px, self.side), self.bits)

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """Return the log frequencies of classes over the visible cells of all images, the same for every part."""
        return marginal_logits(self(images), hidden, self.classes)

    def picture(self, prediction: Tensor, images: Images, hidden: Tensor, *, borrow: bool) -> Tensor | None:
        """Draw each part of a cell in the colour in the middle of its most likely bin."""
        parts = colour_parts(prediction, self.bits, self.channels, self.side, self.cell_px)
        picture = unpatchify(parts, self.cell_px, (hidden.shape[1], hidden.shape[2]))
        return (picture - images.mean) / images.std
