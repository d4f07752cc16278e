"""The mean colour of a cell in 3 bits a channel, 512 classes (ViT, Dosovitskiy et al. 2021, appendix B.1.2)."""

from __future__ import annotations

from torch import Tensor, nn

from mpp.patches import colour_classes, colours, marginal_logits, mean_patches, unpatchify
from mpp.types import Images, PositiveInt, TargetContext


class MeanColorTarget(nn.Module):
    """One class for each cell: the bins of its mean colour, of pixels as they are, not normalised.

    `bits`: of each channel; the paper has 3, which is 512 classes for 3 channels. At most 65,536 classes.
    """

    of = "classes"

    def __init__(self, context: TargetContext, *, bits: PositiveInt = 3) -> None:
        super().__init__()
        if bits * context.channels > 16:
            raise ValueError(f"bits: {bits} for {context.channels} channels makes more than 65,536 classes")
        self.bits, self.channels, self.cell_px = bits, context.channels, context.cell_px
        self.dim = self.classes = 2 ** (bits * context.channels)

    def forward(self, images: Images) -> Tensor:
        return colour_classes(mean_patches(images.raw, self.cell_px, 1), self.bits)

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """The histogram of the visible cells of all these images."""
        return marginal_logits(self(images), hidden, self.classes)

    def picture(self, prediction: Tensor, images: Images, hidden: Tensor, *, borrow: bool) -> Tensor | None:
        """Each cell in the middle of its most likely bin."""
        colour = (
            colours(prediction.argmax(-1), self.bits, self.channels) - images.mean.flatten()
        ) / images.std.flatten()
        flat = colour.repeat_interleave(self.cell_px * self.cell_px, dim=-1)
        return unpatchify(flat, self.cell_px, (hidden.shape[1], hidden.shape[2]))
