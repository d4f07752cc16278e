"""Squared error below `beta`, absolute error above (Girshick 2015, section 2.3; data2vec, Baevski et al. 2022, section
3.3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mpp.objective.interfaces import Loss
from mpp.recipe.values import PositiveFloat


class SmoothL1Loss(Loss):
    """Mean smooth L1 distance over images, predicted cells and values.

    Args:
        beta: Distance at which the loss changes from squared to absolute (data2vec for images: 2.0).
    """

    of = "values"

    def __init__(self, *, beta: PositiveFloat = 2.0) -> None:
        self.beta = beta

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(prediction.float(), target.float(), beta=self.beta)
