"""1 - cosine of prediction and target, for features whose length carries no information (EVA, Fang et al. 2023)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mpp.objective.interfaces import Loss


class CosineLoss(Loss):
    """One minus the cosine, averaged over images and predicted cells, in [0, 2]. A target of zeros costs 1."""

    of = "values"

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1)).mean()
