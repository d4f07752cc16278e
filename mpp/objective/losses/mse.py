"""Mean squared error (MAE, He et al. 2022, section 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mpp.objective.interfaces import Loss


class MseLoss(Loss):
    """Squared error, averaged over images, predicted cells and values."""

    of = "values"

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction.float(), target.float())
