"""A moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpp.parallel.sharding import own_part


def decay_at(decay: float, step: int) -> float:
    """Return the decay of the moving average after `step` steps. The decay is smaller in the first steps."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, decay: float, *, only_if: Tensor) -> None:
    """Move the averaged weights towards the weights of the model, and copy the statistics of batch norms.

    Args:
        averaged: Model with the averaged weights, changed in place. If the model is sharded, it is sharded alike.
        model: Model that is trained.
        decay: Weight of the previous average.
        only_if: () bool on the device, whether the step was made. If it was skipped, the averaged weights stay, and
            the statistics of the model have already been restored.
    """
    averages, latest_weights = ([own_part(p) for p in m.parameters()] for m in (averaged, model))
    torch._foreach_lerp_(averages, latest_weights, [(1 - decay) * only_if] * len(averages))
    for copied, latest in zip(averaged.buffers(), model.buffers(), strict=True):
        copied.copy_(latest)
