"""The loss of a micro-batch of fine-tuning, with every random draw that it needs."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from mpp.data.labeled_sets import LabeledBatch, Labels
from mpp.errors import UserError, one_line
from mpp.finetuning.consistency import Alignment, FixMatch, MixMatch
from mpp.finetuning.distillation import Distillation, open_teacher
from mpp.finetuning.model import Supervised
from mpp.finetuning.unlabeled import first_unlabeled_step
from mpp.parallel.team import Team
from mpp.recipe import registry
from mpp.recipe.finetune import FinetuneRecipe
from mpp.rng import Purpose, torch_seed


class UnlabeledInputs(NamedTuple):
    """Inputs of the loss of unlabeled images that are not in the recipe."""

    averaged: Supervised
    """A moving average of the model's weights, on its device."""
    total_steps: int
    """Number of steps of the trial."""
    class_counts: list[int]
    """Number of training images of each class, including those that the recipe does not choose."""
    mean_prediction: list[float] | None
    """Mean probability of each class on unlabeled images, if a checkpoint has one."""


class MicroLoss:
    """The loss of a micro-batch, a function of (weights, averaged weights, images, seed, position).

    The generators of torch, Python and NumPy are seeded for each micro-batch.

    Args:
        recipe: Recipe of the trial's approach.
        team: Processes of the run.
        model: Model of the trial, already on its device and with its adapters, if any.
        classes: Names of the classes of the training images.
        seed: Seed of the trial.
        unlabeled: Inputs for the loss of unlabeled images. None if the recipe has none under `unlabeled`.

    Raises:
        UserError: If the teacher of `distill` cannot teach these classes.
    """

    def __init__(
        self,
        recipe: FinetuneRecipe,
        team: Team,
        model: Supervised,
        classes: list[str],
        seed: int,
        unlabeled: UnlabeledInputs | None = None,
    ) -> None:
        self.device, self.model, self.seed = team.device, model, seed
        self.global_batch_size = recipe.optim.global_batch_size
        mixing = recipe.mixup > 0 or recipe.cutmix > 0
        self.mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=len(classes)) if mixing else None
        erase = recipe.data.erase
        self.erase = RandomErasing(erase, mode="pixel", device=team.device) if erase else None
        self.distillation = make_distillation(recipe, team, model, classes) if recipe.distill else None
        self.class_counts = unlabeled.class_counts if unlabeled else None
        self.of_unlabeled = make_unlabeled_loss(recipe, team, unlabeled) if unlabeled else None
        self._alignment = self.of_unlabeled.alignment if isinstance(self.of_unlabeled, MixMatch) else None

    def __call__(self, wrapped: torch.nn.Module, batch: LabeledBatch, position: int) -> torch.Tensor:
        """Return the loss, a scalar.

        Args:
            wrapped: Model as the loop calls it: in autocast, with gradients exchanged.
            batch: Labeled images, and views of images without labels if the recipe has any. Load the batch before this
                call, because a dataloader that starts its workers also draws from torch's generator.
            position: Position of the batch's first sample in the run's endless sequence. Together with the seed it
                determines every random draw.
        """
        seed_of_batch = torch_seed(self.seed, Purpose.STEP, position)
        torch.manual_seed(seed_of_batch)  # dropout, drop path
        random.seed(seed_of_batch)  # random erasing
        np.random.seed(torch_seed(self.seed, Purpose.MIX, position) % 2**32)  # mixup, cutmix
        x = self.model.normalise(batch.images.to(self.device, non_blocking=True))
        labels = send_to_device(batch.labels, self.device, non_blocking=True)
        if self.erase is not None:
            x = self.erase(x)
        if isinstance(self.of_unlabeled, MixMatch) and batch.weak is not None and batch.strong is not None:
            weak, strong = (view.to(self.device, non_blocking=True) for view in (batch.weak, batch.strong))
            return self._mixmatch(self.of_unlabeled, wrapped, x, labels, weak, strong, position)
        if self.mix is not None:
            x, labels = self.mix(x, labels)
        own_loss = self.model.task.loss
        if isinstance(self.of_unlabeled, FixMatch) and batch.weak is not None and batch.strong is not None:
            weak, strong = (view.to(self.device, non_blocking=True) for view in (batch.weak, batch.strong))
            return self._fixmatch(self.of_unlabeled, wrapped, x, labels, weak, strong, position)
        if batch.strong is not None:  # unlabeled images, which the teacher of `distill` labels
            unlabeled = self.model.normalise(batch.strong.to(self.device, non_blocking=True))
            if self.erase is not None:
                unlabeled = self.erase(unlabeled)
            if self.mix is not None:  # only the images are mixed: the teacher labels what the student sees
                unlabeled, _ = self.mix(unlabeled, torch.zeros(len(unlabeled), dtype=torch.long, device=self.device))
            x = torch.cat([x, unlabeled])
        outputs = wrapped(x, labels)
        if self.distillation is not None:
            return self.distillation.loss(outputs, x, labels, own_loss)
        loss: torch.Tensor = own_loss(outputs, labels)
        return loss

    def end_step(self, team: Team, *, only_if: torch.Tensor) -> None:
        """Update what later steps need from this one. Every process calls this after the update of the weights.

        Args:
            team: Processes of the run.
            only_if: () bool on the device: whether the step was made.
        """
        if self._alignment is not None:
            self._alignment.end_step(team, only_if=only_if)

    def mean_prediction(self) -> list[float] | None:
        """Return the mean probability of each class on unlabeled images, or None if nothing is aligned."""
        return self._alignment.mean.tolist() if self._alignment is not None else None

    def _fixmatch(
        self,
        fixmatch: FixMatch,
        wrapped: torch.nn.Module,
        x: torch.Tensor,
        labels: Labels,
        weak: torch.Tensor,
        strong: torch.Tensor,
        position: int,
    ) -> torch.Tensor:
        """Return the loss of the labeled images `x` plus that of unlabeled images, given as weak and strong views."""
        images, labeled = len(strong), len(x)
        taught = fixmatch.teach(weak, encoder_learns=self.model.encoder.training)
        if self.device.type == "cpu":
            strong, taught = taught.keep_sure(strong)
        strong = fixmatch.erase(self.model.normalise(strong))
        # Use one forward pass for both kinds of images: batch norms see all of them, and processes exchange once.
        outputs = wrapped(torch.cat([x, strong]), labels)
        step = position // self.global_batch_size
        of_labeled: torch.Tensor = self.model.task.loss(outputs[:labeled], labels)
        return of_labeled + fixmatch.loss(outputs[labeled:], taught, images, step)

    def _mixmatch(
        self,
        mixmatch: MixMatch,
        wrapped: torch.nn.Module,
        x: torch.Tensor,
        labels: torch.Tensor,
        weak: torch.Tensor,
        strong: torch.Tensor,
        position: int,
    ) -> torch.Tensor:
        """Return the loss of the labeled images `x` and of unlabeled images, all of them mixed with each other."""
        taught = mixmatch.teach(weak, encoder_learns=self.model.encoder.training)
        strong = mixmatch.erase(self.model.normalise(strong))
        together, targets = mixmatch.mixed(torch.cat([x, strong]), labels, taught, position // self.global_batch_size)
        return mixmatch.loss(wrapped(together, labels), targets)


def make_unlabeled_loss(recipe: FinetuneRecipe, team: Team, unlabeled: UnlabeledInputs) -> FixMatch | MixMatch:
    """Return the loss of unlabeled images with the settings of the recipe."""
    keys = recipe.unlabeled
    assert keys is not None
    how: dict[str, Any] = {
        "weight": keys.weight,
        "start_step": first_unlabeled_step(recipe, unlabeled.total_steps),
        "warmup_steps": round(keys.warmup * unlabeled.total_steps),
        "erase": keys.erase,
        "autocast": team.autocast,
    }
    if keys.kind == "mixmatch":
        mix, alignment = None, None
        if recipe.mixup or recipe.cutmix:
            classes = len(unlabeled.class_counts)
            mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=classes, multi_label=True)
        if keys.align:
            counts = torch.tensor(unlabeled.class_counts, dtype=torch.float32, device=team.device)
            alignment = Alignment(counts / counts.sum(), unlabeled.mean_prediction)
        return MixMatch(unlabeled.averaged, temperature=keys.temperature, mix=mix, alignment=alignment, **how)
    kind = registry.component("labels", registry.component("task", recipe.task.name).labels)
    return FixMatch(unlabeled.averaged, threshold=keys.threshold, independent_classes=kind.independent_classes, **how)


def make_distillation(recipe: FinetuneRecipe, team: Team, model: Supervised, classes: list[str]) -> Distillation:
    """Open the teachers on the device of the model, and return the loss that uses them.

    Raises:
        UserError: If a teacher cannot teach these classes, or does not run at this image size.
    """
    keys = recipe.distill
    assert keys is not None
    channels = recipe.data.channels
    teachers = [open_teacher(source, classes, channels).to(model.mean.device) for source in keys.teacher]
    mean, std = model.mean / 255, model.std / 255
    distillation = Distillation(
        teachers,
        kind=keys.kind,
        alpha=keys.alpha,
        temperature=keys.temperature,
        mean=mean,
        std=std,
        autocast=team.autocast,
    )
    blank = torch.zeros(1, channels, *recipe.data.image_size, device=mean.device)
    for source, teacher in zip(keys.teacher, distillation.teachers, strict=True):
        try:
            with torch.no_grad(), team.autocast():
                teacher(blank)
        except Exception as error:  # timm's models raise different errors
            raise UserError(f"distill.teacher: {source} does not run: {one_line(error)}") from error
    return distillation
