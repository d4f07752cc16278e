"""Learn from unlabeled images: confident predictions of an averaged model are the labels (FixMatch, Sohn et al. 2020).

The averaged model judges a weakly augmented view of an image. The model learns from a strongly augmented view.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mpp.finetuning.model import Supervised
from mpp.training.batch_norms import batch_norms_of, use_batch_statistics


class Taught(NamedTuple):
    """Labels that the averaged model predicts from weak views of U images."""

    targets: Tensor
    """Class of each image, (U,) int64. If an image may have several classes, (U, classes) float32, 0 or 1."""
    sure: Tensor
    """Whether each target is certain enough to be learned, bool of the shape of `targets`."""

    def keep_sure(self, strong: Tensor) -> tuple[Tensor, Taught]:
        """Return the strong views and the targets of only the images that have a sure target.

        The loss of the other images would be multiplied by zero. This is for CPUs: on a GPU each step would wait for
        the number of such images, which only the device has. On a CPU, batch norms see only the remaining strong views.
        On a GPU they see all of them.

        Args:
            strong: Strong views of the images, (U, C, H, W).
        """
        kept = self.sure if self.sure.dim() == 1 else self.sure.any(-1)
        return strong[kept], Taught(self.targets[kept], self.sure[kept])


class Consistency:
    """The loss of unlabeled images, which is added to that of labeled images.

    Args:
        averaged: Model with a moving average of the weights. It judges weak views in eval mode.
        threshold: Least probability of a target that is learned.
        weight: Weight of this loss after the warm-up.
        warmup_steps: Number of steps in which the weight rises from 0.
        erase: Probability of random erasing in the strong view.
        independent_classes: Whether an image may have several classes.
        autocast: Autocast context of the run.
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
        self.averaged, self.batch_norms = averaged.eval(), batch_norms_of(averaged)
        self.threshold, self.weight, self.warmup_steps = threshold, weight, warmup_steps
        self.independent_classes, self.autocast = independent_classes, autocast
        self.erase = RandomErasing(erase, mode="pixel", device=averaged.mean.device)
        """Random erasing for strong views, (U, C, H, W) normalised."""

    @torch.no_grad()
    def teach(self, weak: Tensor, *, encoder_learns: bool) -> Taught:
        """Return the targets that the averaged model predicts from weak views.

        Args:
            weak: Weak views, (U, C, H, W) uint8.
            encoder_learns: Whether the encoder is trained in this step. If so, its batch norms have statistics of
                strong views, and therefore normalise by the statistics of this batch. A frozen encoder uses its own
                statistics.
        """
        adapted = self.batch_norms if encoder_learns and len(weak) > 1 else []
        with self.autocast(), use_batch_statistics(adapted):
            logits = self.averaged(self.averaged.normalise(weak)).float()
        if self.independent_classes:
            said = logits.sigmoid()
            return Taught((said > 0.5).float(), (said >= self.threshold) | (said <= 1 - self.threshold))
        likeliest, classes = logits.softmax(-1).max(-1)
        return Taught(classes, likeliest >= self.threshold)

    def loss(self, logits: Tensor, taught: Taught, images: int, step: int) -> Tensor:
        """Return the weighted loss of a micro-batch.

        Args:
            logits: Logits of the strong views, (U, classes).
            taught: Targets from the weak views of the same images.
            images: Number of unlabeled images of the micro-batch, including those that `keep_sure` left out.
            step: Step of the trial, counted from 0.
        """
        logits = logits.float()
        if self.independent_classes:
            each = F.binary_cross_entropy_with_logits(logits, taught.targets, reduction="none") / logits.shape[1]
        else:
            each = F.cross_entropy(logits, taught.targets, reduction="none")
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.weight * rise * (each * taught.sure).sum() / images
