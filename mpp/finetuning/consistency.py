"""What images without labels teach: what an averaged model is sure of in a weak view (FixMatch, Sohn et al. 2020)."""

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
    """What weak views of images teach."""

    targets: Tensor
    """(U,) int64 classes; (U, classes) float32, 0 or 1, where an image may have several."""
    sure: Tensor
    """bool, as `targets`: whether it is learned."""

    def keep_sure(self, strong: Tensor) -> tuple[Tensor, Taught]:
        """Keep the strong views, (U, C, H, W), of those images that teach something, with what they teach.

        The loss of the others would be multiplied by zero. How many they are is known on the device alone: on a GPU
        each step would wait for that, so this is for CPUs. Batch norms, which on a GPU see all strong views, see those
        that are left.
        """
        kept = self.sure if self.sure.dim() == 1 else self.sure.any(-1)
        return strong[kept], Taught(self.targets[kept], self.sure[kept])


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
        self.averaged, self.batch_norms = averaged.eval(), batch_norms_of(averaged)
        self.threshold, self.weight, self.warmup_steps = threshold, weight, warmup_steps
        self.independent_classes, self.autocast = independent_classes, autocast
        self.erase = RandomErasing(erase, mode="pixel", device=averaged.mean.device)
        """Erases a part of strong views, (U, C, H, W) normalised."""

    @torch.no_grad()
    def teach(self, weak: Tensor, *, encoder_learns: bool) -> Taught:
        """Judge weak views.

        Args:
            weak: (U, C, H, W) uint8.
            encoder_learns: Whether it does in this step. Its batch norms then have statistics of strong views, and
                normalise by those of the weak ones instead. A frozen encoder keeps its own.
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
            logits: (U, classes) of the strong views.
            taught: By the weak views of the same images.
            images: Of the micro-batch, those included that were left out because nothing is sure.
            step: Of the run, from 0.
        """
        logits = logits.float()
        if self.independent_classes:
            each = F.binary_cross_entropy_with_logits(logits, taught.targets, reduction="none") / logits.shape[1]
        else:
            each = F.cross_entropy(logits, taught.targets, reduction="none")
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.weight * rise * (each * taught.sure).sum() / images
