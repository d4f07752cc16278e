"""What images without labels teach: what an averaged model is sure of in a weak view (FixMatch, Sohn et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mpp.finetuning.model import Supervised


class Consistency:
    """The loss of unlabeled images, beside that of the labeled ones.

    Args:
        averaged: A moving average of the model's weights. It judges weak views in eval mode.
        threshold: Least probability of what is learned.
        weight: Of this loss in the end.
        warmup_steps: In which the weight rises from 0.
        erase: Probability of random erasing in the strong view.
        independent_classes: Whether an image may have several classes.
        autocast: As of the run.
    """

    def __init__(
        self,
        averaged: Supervised,
        *,
        threshold: float,
        weight: float,
        warmup_steps: int,
        erase: float,
        independent_classes: bool,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.averaged = averaged.eval()
        self.threshold, self.weight, self.warmup_steps = threshold, weight, warmup_steps
        self.independent_classes, self.autocast = independent_classes, autocast
        self.erase = RandomErasing(erase, mode="pixel", device=averaged.mean.device)
        """Erases a part of strong views, (U, C, H, W) normalised."""

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """(U, C, H, W) uint8 weak views -> (U, classes) float32, what the averaged model says."""
        with self.autocast():
            logits = self.averaged(self.averaged.normalise(images)).float()
        return logits.sigmoid() if self.independent_classes else logits.softmax(-1)

    def loss(self, logits: Tensor, weak: Tensor, step: int) -> Tensor:
        """Return the weighted loss of a micro-batch.

        Args:
            logits: (U, classes) of the strong views.
            weak: (U, C, H, W) uint8 weak views of the same images.
            step: Of the run, from 0.
        """
        said, logits = self.probabilities(weak), logits.float()
        if self.independent_classes:
            sure = (said >= self.threshold) | (said <= 1 - self.threshold)
            each = F.binary_cross_entropy_with_logits(logits, (said > 0.5).float(), reduction="none")
        else:
            likeliest, classes = said.max(-1)
            sure = likeliest >= self.threshold
            each = F.cross_entropy(logits, classes, reduction="none")
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.weight * rise * (each * sure).mean()
