"""Cross-entropy over classes: colours as in ViT's masked patch prediction (Dosovitskiy et al. 2021, B.1.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mpp.objective.interfaces import Loss


class CrossEntropyLoss(Loss):
    """Cross-entropy in nats, averaged over images, predicted cells and the class numbers of a cell."""

    of = "classes"

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss, from logits (B, P, K·classes) and class numbers (B, P, K) int64."""
        logits = prediction.float().unflatten(-1, (target.shape[-1], -1))
        return F.cross_entropy(logits.flatten(0, -2), target.flatten())
