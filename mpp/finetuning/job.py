"""A trial of fine-tuning that is ready to train: everything its loop works with."""

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
    """What the trials of a run share."""

    recipe: FinetuneRecipe
    """Resolved: nothing changes it any more."""
    team: Team
    train: LabeledImages
    val: LabeledImages
    unlabeled: UnlabeledImages | None
    fingerprint: str
    """Of images, labels and the weights that the trials begin with."""
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
    """Of this approach, see `recipe_of_approach`."""
    kind: LabelKind
    """Of this approach, which may read images at a size of its own."""
    plan: Plan
    subset: np.ndarray
    """Numbers of the images to train on."""
    held_out: np.ndarray
    """Numbers of training images that are judged on the way, if the recipe stops early."""
    dataset: KeyedDataset
    sampler: MicroBatches
    """This process's micro-batches, from the first step that is left."""
    model: Supervised
    wrapped: nn.Module
    """The model as the loop calls it: in autocast, with gradients exchanged."""
    averaged: Supervised | None
    """A moving average of the weights."""
    encoder_learns_at: int
    """The first step in which a parameter of the encoder learns."""
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
        """The model that is judged and exported."""
        return self.averaged or self.model

    def learning_parameters(self, step: int) -> list[nn.Parameter]:
        """Return the parameters that learn at a step. The others lose their gradients: they get no optimizer state,
        and no part in the norm."""
        learning: list[nn.Parameter] = []
        for group in self.optimizer.plain.param_groups:
            if step >= group.get("starts_at_step", 0):
                learning += group["params"]
            else:
                for p in group["params"]:
                    p.grad = None
        return learning
