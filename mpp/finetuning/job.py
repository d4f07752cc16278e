"""A fine-tuning trial that is ready to train: everything that the training loop uses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from torch import nn

from mpp.data.labeled_sets import LabeledBatch
from mpp.data.loader import KeyedDataset
from mpp.data.order import MicroBatches
from mpp.data.readers import LabeledImages
from mpp.finetuning.label_kind import LabelKind
from mpp.finetuning.micro_loss import MicroLoss
from mpp.finetuning.model import Supervised
from mpp.finetuning.progress import Progress
from mpp.finetuning.trial import Trial
from mpp.finetuning.unlabeled import UnlabeledImages
from mpp.parallel.liveness import Watch
from mpp.parallel.signals import StopRequest
from mpp.parallel.team import Team
from mpp.recipe.finetune import FinetuneRecipe
from mpp.runs.log import RunLog
from mpp.training.device_time import DeviceTime
from mpp.training.nonfinite import BatchNormStatistics
from mpp.training.optimizer import GuardedOptimizer
from mpp.training.plan import Plan
from mpp.training.steps import MicroBatchStream, Pace


@dataclass(frozen=True)
class Run:
    """State that all trials of a run share."""

    recipe: FinetuneRecipe
    """Recipe of the run, resolved and final."""
    team: Team
    train: LabeledImages
    val: LabeledImages
    unlabeled: UnlabeledImages | None
    fingerprint: str
    """Checksum of the images, the labels, and the weights of encoder and teacher, except those that timm publishes."""
    stop_request: StopRequest
    watch: Watch
    status: Callable[..., None]
    """Writes the run's status.json; each trial also has its own."""
    until_the_end: ExitStack


@dataclass
class Finetuning:
    """A trial that is ready to train."""

    run: Run
    trial: Trial
    recipe: FinetuneRecipe
    """Recipe of this approach, see `recipe_of_approach`."""
    kind: LabelKind
    """Kind of label, with the settings of this approach, which may use another image size."""
    plan: Plan
    subset: np.ndarray
    """Numbers of the images to train on."""
    held_out: np.ndarray
    """Numbers of the held-out training images that are judged during training if the recipe stops early."""
    dataset: KeyedDataset
    sampler: MicroBatches
    """Micro-batches of this process, from the first remaining step."""
    model: Supervised
    wrapped: nn.Module
    """The model as the loop calls it: in autocast, with gradients exchanged."""
    averaged: Supervised | None
    """Model with a moving average of the weights. None if the recipe has no `ema_decay`."""
    encoder_learns_at: int
    """The first step in which a parameter of the encoder is trained. If none is, the number of steps."""
    optimizer: GuardedOptimizer
    micro_loss: MicroLoss
    batch_norms: BatchNormStatistics
    progress: Progress
    micro_batches: MicroBatchStream[LabeledBatch]
    pace: Pace
    device_time: DeviceTime
    log: RunLog

    @property
    def judged(self) -> Supervised:
        """Return the model that is judged and exported."""
        return self.averaged or self.model

    def learning_parameters(self, step: int) -> list[nn.Parameter]:
        """Return the parameters that are trained at a step."""
        groups = self.optimizer.plain.param_groups
        return [p for group in groups if step >= group.get("starts_at_step", 0) for p in group["params"]]

    def drop_frozen_gradients(self, step: int) -> None:
        """Discard the gradients of frozen parameters, so that they get no optimizer state."""
        for group in self.optimizer.plain.param_groups:
            if step < group.get("starts_at_step", 0):
                for p in group["params"]:
                    p.grad = None
