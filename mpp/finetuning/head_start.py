"""Start a head as a linear probe, fitted to the frozen encoder's features before training (LP-FT)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpp.data.loader import batches
from mpp.data.subsets import split
from mpp.errors import UserError
from mpp.evaluation.probes import linear
from mpp.evaluation.result import best_setting
from mpp.finetuning.job import Run
from mpp.finetuning.label_kind import LabelKind
from mpp.finetuning.model import Supervised
from mpp.recipe.finetune import FinetuneRecipe

WEIGHT_DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3)
"""Weight decays that are tried for the probe. The best is chosen on a part of the training images (a guess)."""
TUNED_ON = 0.2
"""Fraction of the training images on which the weight decay is chosen."""
MAX_ITERATIONS = 100


def check_head(model: Supervised) -> None:
    """Check that a head can begin as a probe.

    Raises:
        UserError: If the head is not one linear layer.
    """
    if model.task.hidden is not None or model.distilled is not None:
        raise UserError("head_init: probe: requires a head of one linear layer; use head_init=zero")


def fit_head(
    run: Run, recipe: FinetuneRecipe, kind: LabelKind, model: Supervised, subset: np.ndarray, seed: int
) -> None:
    """Set the weights of the head to a linear probe of the encoder's features.

    While a random head learns, fine-tuning distorts the features (Kumar et al. 2022, section 4). All processes compute
    features, and the main process fits the probe.

    Args:
        run: State that all trials share.
        recipe: Recipe of the approach.
        kind: Kind of label, for this approach.
        model: Classifier on its device, whose head is changed.
        subset: Numbers of the images to train on.
        seed: Seed of the trial.

    Raises:
        UserError: If no image can be read.
    """
    team, chosen = run.team, np.unique(subset)
    read = team.gather(_read_features(run, recipe, kind, model, chosen[team.rank :: team.world]))
    if not read:
        raise UserError("data.train: not one of the chosen images can be read")
    numbers, x, labels = (np.concatenate(parts) for parts in zip(*read, strict=True))
    order = np.argsort(numbers)  # so that the probe is the same for any number of processes
    classes, device = len(run.train.classes), model.mean.device
    weight, bias = team.on_main(lambda: _fitted(x[order], labels[order], classes, device, seed))
    with torch.no_grad():
        model.task.out.weight.copy_(weight)
        model.task.out.bias.copy_(bias)


def _fitted(
    x: np.ndarray, labels: np.ndarray, classes: int, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight (classes, D) and bias (classes,) of a probe on features (n, D) with labels (n,).

    They apply to the encoder's features as they come, without standardisation.
    """
    fit, tune = split(labels, TUNED_ON, seed)
    how: Any = {"device": device, "max_iterations": MAX_ITERATIONS}
    decay = max(WEIGHT_DECAYS)
    if len(tune):
        tuned = linear.accuracies(x[fit], labels[fit], x[tune], labels[tune], classes, WEIGHT_DECAYS, **how)
        decay = best_setting(tuned, smaller=False)
    probe = linear.fit(x, labels, classes, decay, **how)
    weight = probe.weight * probe.scale
    return weight.cpu(), (probe.bias - weight @ probe.mean).cpu()


@torch.no_grad()
def _read_features(
    run: Run, recipe: FinetuneRecipe, kind: LabelKind, model: Supervised, chosen: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return the numbers (n,), features (n, D) and labels (n,) of the readable images, for each batch of central crops.

    The model is left in eval mode.
    """
    model.eval()
    size = min(kind.judged_at_once, recipe.optim.max_batch_per_device)
    parts = [chosen[i : i + size].tolist() for i in range(0, len(chosen), size)]
    read = []
    for batch in batches(kind.judging_set(run.train), parts, workers=recipe.data.workers, pin_memory=False):
        run.watch.at(0, "reading features")
        if batch.readable.any():
            images, labels = kind.readable_part(batch)
            assert isinstance(images, torch.Tensor)
            assert isinstance(labels, torch.Tensor)
            with run.team.autocast():
                features = model.encoder(model.normalise(images.to(model.mean.device)))
            numbers = batch.positions[batch.readable]
            read.append((numbers.numpy(), features.float().cpu().numpy(), labels.numpy()))
    return read
