"""The batches of a trial, in the order that its seed determines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpp.data.labeled_sets import LabeledBatch
from mpp.data.loader import KeyedDataset
from mpp.data.order import MicroBatches, Order
from mpp.data.transfer import load_ahead
from mpp.finetuning.job import Run
from mpp.finetuning.label_kind import LabelKind
from mpp.finetuning.trial import Trial
from mpp.finetuning.unlabeled import add_unlabeled, unlabeled_per_label
from mpp.recipe.finetune import FinetuneRecipe
from mpp.training.exchange import accumulation


@dataclass
class TrialBatches:
    """The batches of this process for the remaining steps of a trial."""

    dataset: KeyedDataset
    sampler: MicroBatches
    """Keys of the micro-batches of this process."""
    loaded: Iterator[LabeledBatch]
    micro_batches: int
    """Micro-batches per step and process."""


def load_batches(
    run: Run, trial: Trial, recipe: FinetuneRecipe, kind: LabelKind, subset: np.ndarray, *, first_step: int, steps: int
) -> TrialBatches:
    """Return the batches of this process from a step to the end of the trial.

    Args:
        run: State that all trials share.
        trial: Trial, whose seed determines the order and the augmentation.
        recipe: Recipe of the trial's approach.
        kind: Kind of label, for this approach.
        subset: Numbers of the images to train on.
        first_step: First step, counted from 0.
        steps: Number of steps from there to the end.

    Raises:
        UserError: If the global batch cannot be divided among the processes. While batches are loaded, also if images
            cannot be read.
    """
    optim, team = recipe.optim, run.team
    micro_batches = accumulation(optim.global_batch_size, team.world, optim.max_batch_per_device)
    dataset = kind.training_set(run.train, subset, trial.seed)
    if run.unlabeled and unlabeled_per_label(recipe):
        dataset = add_unlabeled(dataset, run.unlabeled, recipe, trial.seed, first_step + steps)
    sampler = MicroBatches(
        Order([len(subset)], global_batch=optim.global_batch_size, seed=trial.seed, lanes=1),
        seen=first_step * optim.global_batch_size,
        steps=steps,
        accumulate=micro_batches,
        rank=team.rank,
        world=team.world,
    )
    loaded = load_ahead(dataset, sampler, workers=recipe.data.workers, device=team.device)
    return TrialBatches(dataset, sampler, loaded, micro_batches)
