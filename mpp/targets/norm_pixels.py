"""Pixels normalised by the mean and variance of their own patch (MAE, He et al. 2022, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from mpp.patches import patchify, repeat_cells, unpatchify

EPSILON = 1e-6  # added to the variance, as MAE's published code does


class NormPixelsTarget:
    """(patch - mean) / std over all pixels and channels of the patch, unbiased variance, in float32."""

    def __init__(self, channels: int, cell_px: int) -> None:
        self.channels, self.cell_px = channels, cell_px
        self.dim = channels * cell_px * cell_px

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        patches = patchify(images.float(), self.cell_px)
        mean = patches.mean(-1, keepdim=True)
        std = (patches.var(-1, keepdim=True) + EPSILON).sqrt()
        return patches, mean, std

    def __call__(self, images: Tensor) -> Tensor:
        patches, mean, std = self._statistics(images)
        return (patches - mean) / std

    def trivial(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Zero: the mean of every normalised patch."""
        return torch.zeros(len(images), hidden[0].numel(), self.dim, device=images.device)

    def picture(self, values: Tensor, images: Tensor, hidden: Tensor, *, borrow: bool) -> Tensor:
        """borrow=True: each patch's own mean and std, which the model never saw; else the visible pixels'."""
        if borrow:
            _, mean, std = self._statistics(images)
        else:
            visible = repeat_cells(~hidden, self.cell_px).unsqueeze(1).expand_as(images)
            count = visible.sum((1, 2, 3))
            zeroed = torch.where(visible, images.float(), 0.0)
            centre = zeroed.sum((1, 2, 3)) / count
            square = torch.where(visible, (images.float() - centre[:, None, None, None]) ** 2, 0.0)
            mean, std = centre[:, None, None], (square.sum((1, 2, 3)) / count).sqrt()[:, None, None]
        return unpatchify(values * std + mean, self.cell_px, (hidden.shape[1], hidden.shape[2]))
