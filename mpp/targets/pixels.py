"""The pixels of a cell (ViT, Dosovitskiy et al. 2021, appendix B.1.2, full-patch regression; SimMIM)."""

from __future__ import annotations

from torch import Tensor

from mpp.patches import patchify, repeat_cells, unpatchify


class PixelsTarget:
    """Pixels normalised by the data set's mean and std, nothing more."""

    def __init__(self, channels: int, cell_px: int) -> None:
        self.channels, self.cell_px = channels, cell_px
        self.dim = channels * cell_px * cell_px

    def __call__(self, images: Tensor) -> Tensor:
        return patchify(images.float(), self.cell_px)

    def trivial(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Every hidden cell gets the mean visible colour of its image."""
        visible = repeat_cells(~hidden, self.cell_px).unsqueeze(1)
        mean = (images.float() * visible).sum((2, 3)) / visible.sum((2, 3))
        flat = mean.repeat_interleave(self.cell_px * self.cell_px, dim=1)
        return flat.unsqueeze(1).expand(-1, hidden[0].numel(), -1)

    def picture(self, values: Tensor, images: Tensor, hidden: Tensor, *, borrow: bool) -> Tensor:
        return unpatchify(values, self.cell_px, (hidden.shape[1], hidden.shape[2]))
