"""The batches of a trial, in the order of its seed."""

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
    """Some steps of a trial."""

    dataset: KeyedDataset
    sampler: MicroBatches
    """This process's micro-batches."""
    loaded: Iterator[LabeledBatch]
    micro_batches: int
    """How many make up one step of a process."""


def load_batches(
    run: Run, trial: Trial, recipe: FinetuneRecipe, kind: LabelKind, subset: np.ndarray, *, first_step: int, steps: int
) -> TrialBatches:
    """Load this process's part of some steps.

    Args:
        run: What the trials share.
        trial: Whose seed draws the order and the augmentation.
        recipe: Of the trial's approach.
        kind: Of label, for this approach.
        subset: Numbers of the images to train on.
        first_step: Counts from 0.
        steps: How many there are.

    Raises:
        UserError: The global batch cannot be divided among the processes; or, from a worker, images cannot be read.
    """
    optim, team = recipe.optim, run.team
    micro_batches = accumulation(optim.global_batch_size, team.world, optim.max_batch_per_device)
    dataset = kind.training_set(run.train, subset, trial.seed)
    if run.unlabeled and unlabeled_per_label(recipe):
        dataset = add_unlabeled(dataset, run.unlabeled, recipe, trial.seed)
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
