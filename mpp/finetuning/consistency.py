"""Learn from unlabeled images: predictions of an averaged model are the labels.

The averaged model judges a weakly augmented view of an image. The model learns from a strongly augmented view.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mpp.finetuning.model import Supervised
from mpp.parallel.team import Team
from mpp.training.batch_norms import batch_norms_of, use_batch_statistics

MEAN_DECAY = 0.99
"""Decay of the running mean of predictions in each step (a guess)."""
SMALLEST = 1e-6
"""Least probability that predictions are aligned by (a guess)."""


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


class UnlabeledLoss:
    """The base of losses of unlabeled images: an averaged model that judges them, and the weight of the loss.

    Args:
        averaged: Model with a moving average of the weights. It judges weak views in eval mode.
        weight: Weight of this loss after the warm-up.
        start_step: The first step that has unlabeled images, counted from 0.
        warmup_steps: Number of steps in which the weight rises from 0, from `start_step` on.
        erase: Probability of random erasing in the strong view.
        autocast: Autocast context of the run.
    """

    def __init__(
        self,
        averaged: Supervised,
        *,
        weight: float,
        start_step: int,
        warmup_steps: int,
        erase: float,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.averaged, self.batch_norms = averaged.eval(), batch_norms_of(averaged)
        self.weight, self.start_step, self.warmup_steps, self.autocast = weight, start_step, warmup_steps, autocast
        self.erase = RandomErasing(erase, mode="pixel", device=averaged.mean.device)
        """Random erasing for strong views, (U, C, H, W) normalised."""

    @torch.no_grad()
    def judge(self, weak: Tensor, *, encoder_learns: bool) -> Tensor:
        """Return the averaged model's logits of weak views, (U, classes) float32.

        Args:
            weak: Weak views, (U, C, H, W) uint8.
            encoder_learns: Whether the encoder is trained in this step. If so, its batch norms have statistics of
                strong views, and therefore normalise by the statistics of this batch. A frozen encoder uses its own
                statistics.
        """
        adapted = self.batch_norms if encoder_learns and len(weak) > 1 else []
        with self.autocast(), use_batch_statistics(adapted):
            logits: Tensor = self.averaged(self.averaged.normalise(weak))
        return logits.float()

    def weight_at(self, step: int) -> float:
        """Return the weight of this loss in a step, counted from 0."""
        return self.weight * (min(1.0, (step - self.start_step + 1) / self.warmup_steps) if self.warmup_steps else 1.0)


class FixMatch(UnlabeledLoss):
    """Learn the averaged model's class of each image if it is sure enough (FixMatch, Sohn et al. 2020).

    Args:
        averaged: Model with a moving average of the weights.
        threshold: Least probability of a target that is learned.
        independent_classes: Whether an image may have several classes.
        **how: Other arguments of `UnlabeledLoss`.
    """

    def __init__(self, averaged: Supervised, *, threshold: float, independent_classes: bool, **how: Any) -> None:
        super().__init__(averaged, **how)
        self.threshold, self.independent_classes = threshold, independent_classes

    def teach(self, weak: Tensor, *, encoder_learns: bool) -> Taught:
        """Return the targets that the averaged model predicts from weak views. For the arguments, see `judge`."""
        logits = self.judge(weak, encoder_learns=encoder_learns)
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
        return self.weight_at(step) * (each * taught.sure).sum() / images


class Alignment:
    """Align sharpened predictions with the labels (after ReMixMatch, Berthelot et al. 2020, section 3.1).

    The probability of each class is divided by a running mean of its predicted probabilities before it is sharpened,
    and multiplied by its fraction among the labels afterwards. So a model that knows nothing of an image teaches these
    fractions. ReMixMatch does both before it sharpens, which is the same if all classes are equally frequent.

    All micro-batches of a step are aligned by the mean of the earlier steps. So the number of processes and
    micro-batches makes no difference.

    Args:
        class_fractions: Fraction of each class among the labels, (classes,).
        mean: Mean probability of each class in earlier steps. None means that of `class_fractions`.
    """

    def __init__(self, class_fractions: Tensor, mean: list[float] | None = None) -> None:
        self.class_fractions = class_fractions
        self.mean = class_fractions.clone() if mean is None else class_fractions.new_tensor(mean)
        """Mean probability of each class, (classes,)."""
        self._sum, self._images = torch.zeros_like(class_fractions), 0

    def align(self, logits: Tensor, temperature: float) -> Tensor:
        """Return sharpened and aligned probabilities, and remember the predictions for the mean.

        Args:
            logits: Logits of images, (U, classes) float32.
            temperature: Temperature of the sharpening.
        """
        self._sum += logits.softmax(-1).sum(0)
        self._images += len(logits)
        log_fractions, log_mean = (values.clamp(min=SMALLEST).log() for values in (self.class_fractions, self.mean))
        return ((logits - log_mean) / temperature + log_fractions).softmax(-1)

    def end_step(self, team: Team, *, only_if: Tensor) -> None:
        """Move the mean towards the mean of this step's predictions on all processes. Every process calls this.

        Args:
            team: Processes of the run.
            only_if: () bool on the device: whether the step was made. If it was skipped, the mean stays.
        """
        if not self._images:
            return
        of_step = team.sum_tensor(self._sum) / (self._images * team.world)
        self.mean = torch.where(only_if, self.mean.lerp(of_step, 1 - MEAN_DECAY), self.mean)
        self._sum, self._images = torch.zeros_like(self._sum), 0


class MixMatch(UnlabeledLoss):
    """Learn the averaged model's sharpened probabilities of every image (MixMatch, Berthelot et al. 2019).

    Labeled and unlabeled images are mixed with each other. Differences from the paper: the averaged model predicts from
    one weak view, the model learns from a strong view, and the loss is the cross-entropy for all images.

    Args:
        averaged: Model with a moving average of the weights.
        temperature: Temperature of the sharpening. Probabilities are raised to the power 1 / temperature.
        mix: Mixup of timm for dense labels. None means that images are not mixed.
        alignment: Aligns the predictions with the labels. None means that they are not aligned.
        **how: Other arguments of `UnlabeledLoss`.
    """

    def __init__(
        self,
        averaged: Supervised,
        *,
        temperature: float,
        mix: Mixup | None,
        alignment: Alignment | None,
        **how: Any,
    ) -> None:
        super().__init__(averaged, **how)
        self.temperature, self.mix, self.alignment = temperature, mix, alignment

    def teach(self, weak: Tensor, *, encoder_learns: bool) -> Tensor:
        """Return the sharpened probabilities, (U, classes). For the arguments, see `judge`."""
        logits = self.judge(weak, encoder_learns=encoder_learns)
        if self.alignment is not None:
            return self.alignment.align(logits, self.temperature)
        return (logits / self.temperature).softmax(-1)

    def mixed(self, x: Tensor, labels: Tensor, taught: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mix labeled and unlabeled images, and their targets.

        Args:
            x: B images with labels, then U without, (B + U, C, H, W).
            labels: Class numbers of the first B images, (B,) int64.
            taught: Probabilities of the other images, (U, classes).
            step: Step of the trial, counted from 0.

        Returns:
            Images as `x`. Targets (B + U, classes), multiplied by the weights of their images: those of labeled images
            sum to 1, those of unlabeled images to the weight of this loss.
        """
        of_labeled = F.one_hot(labels, taught.shape[1]).float() / len(labels)
        targets = torch.cat([of_labeled, self.weight_at(step) * taught / max(len(taught), 1)])
        if self.mix is None:
            return x, targets
        order = torch.randperm(len(x), device=x.device)  # timm mixes the first image with the last, and so on
        mixed: tuple[Tensor, Tensor] = self.mix(x[order], targets[order])
        return mixed

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy with weighted targets. Both are (B + U, classes)."""
        return -(targets * logits.float().log_softmax(-1)).sum()
