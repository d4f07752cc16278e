"""Kullback-Leibler divergence from target probabilities, whose gradient is that of a cross-entropy (CAPI, Darcet et al.
2025)."""

from __future__ import annotations

from torch import Tensor

from mpp.objective.interfaces import Loss


class KlLoss(Loss):
    """Divergence of the predicted from the target probabilities in nats, averaged over images and predicted cells."""

    of = "probabilities"

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss, from logits (B, P, classes) and probabilities of the same shape."""
        target = target.float()
        log_ratio = target.clamp_min(1e-30).log() - prediction.float().log_softmax(-1)
        return (target * log_ratio).sum(-1).mean()
