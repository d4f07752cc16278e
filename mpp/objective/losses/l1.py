"""Mean absolute error (SimMIM, Xie et al. 2022, section 3.4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mpp.objective.interfaces import Loss


class L1Loss(Loss):
    """Absolute error, averaged over images, predicted cells and values."""

    of = "values"

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(prediction.float(), target.float())
