"""Cross-entropy with probabilities as targets (CAPI, Darcet et al. 2025)."""

from __future__ import annotations

from torch import Tensor

from mpp.objective.interfaces import Loss


class SoftCrossEntropyLoss(Loss):
    """Cross-entropy in nats, averaged over images and predicted cells. Its least value is the targets' entropy."""

    of = "probabilities"

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss, from logits (B, P, classes) and probabilities of the same shape."""
        return -(target.float() * prediction.float().log_softmax(-1)).sum(-1).mean()
