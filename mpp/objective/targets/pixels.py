"""The pixels of a cell (ViT, Dosovitskiy et al. 2021, appendix B.1.2, full-patch regression; SimMIM)."""

from __future__ import annotations

from torch import Tensor

from mpp.data.batch import Images
from mpp.encoders.cells import patches_at, patchify, repeat_cells, unpatchify
from mpp.objective.interfaces import Target, TargetContext


class PixelsTarget(Target):
    """Predict pixels, normalised with the mean and std of the recipe's data."""

    of = "values"

    def __init__(self, context: TargetContext) -> None:
        super().__init__()
        self.cell_px = context.cell_px
        self.dim = context.channels * context.cell_px * context.cell_px

    def forward(self, images: Images) -> Tensor:
        return patchify(images.normalised.float(), self.cell_px)

    def at(self, images: Images, cells: Tensor) -> Tensor:
        return patches_at(images.normalised.float(), self.cell_px, cells)

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """Return the mean visible colour of the image for every cell."""
        visible = repeat_cells(~hidden, self.cell_px).unsqueeze(1)
        mean = (images.normalised.float() * visible).sum((2, 3)) / visible.sum((2, 3))
        flat = mean.repeat_interleave(self.cell_px * self.cell_px, dim=1)
        return flat.unsqueeze(1).expand(-1, hidden[0].numel(), -1)

    def picture(self, prediction: Tensor, images: Images, hidden: Tensor, *, borrow: bool) -> Tensor | None:
        return unpatchify(prediction, self.cell_px, (hidden.shape[1], hidden.shape[2]))
