"""Pixels normalised by the mean and variance of their own patch (MAE, He et al. 2022, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from mpp.data.batch import Images
from mpp.encoders.cells import patches_at, patchify, repeat_cells, unpatchify
from mpp.objective.interfaces import Target, TargetContext

EPSILON = 1e-6  # added to the variance, as in MAE's published code


class NormPixelsTarget(Target):
    """Predict (patch - mean) / std over all pixels and channels of a patch, with unbiased variance, in float32."""

    of = "values"

    def __init__(self, context: TargetContext) -> None:
        super().__init__()
        self.cell_px = context.cell_px
        self.dim = context.channels * context.cell_px * context.cell_px

    def forward(self, images: Images) -> Tensor:
        return _by_their_own(patchify(images.normalised.float(), self.cell_px))

    def at(self, images: Images, cells: Tensor) -> Tensor:
        return _by_their_own(patches_at(images.normalised.float(), self.cell_px, cells))

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """Return zeros, the mean of every normalised patch."""
        return torch.zeros(len(hidden), hidden[0].numel(), self.dim, device=hidden.device)

    def picture(self, prediction: Tensor, images: Images, hidden: Tensor, *, borrow: bool) -> Tensor | None:
        """Scale the prediction back to pixels of the image.

        If `borrow` is set, the mean and std of each patch itself are used, which the model never saw. Otherwise, those
        of the image's visible pixels are used.
        """
        if borrow:
            mean, std = _statistics(patchify(images.normalised.float(), self.cell_px))
        else:
            x = images.normalised.float()
            visible = repeat_cells(~hidden, self.cell_px).unsqueeze(1).expand_as(x)
            count = visible.sum((1, 2, 3))
            centre = torch.where(visible, x, 0.0).sum((1, 2, 3)) / count
            square = torch.where(visible, (x - centre[:, None, None, None]) ** 2, 0.0)
            mean, std = centre[:, None, None], (square.sum((1, 2, 3)) / count).sqrt()[:, None, None]
        return unpatchify(prediction * std + mean, self.cell_px, (hidden.shape[1], hidden.shape[2]))


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each patch."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + EPSILON).sqrt()


def _by_their_own(patches: Tensor) -> Tensor:
    mean, std = _statistics(patches)
    return (patches - mean) / std
