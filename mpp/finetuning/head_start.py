"""A head that begins as a linear probe: fitted to the frozen encoder's features before anything is trained (LP-FT)."""

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
"""Weight decays of the probe that are tried. The best one is chosen on a part of the training images (a guess)."""
TUNED_ON = 0.2
"""That part."""
MAX_ITERATIONS = 100
AT_ONCE = 256


def check_head(model: Supervised) -> None:
    """Check that a head can begin as a probe.

    Raises:
        UserError: It is not one linear layer.
    """
    if model.task.hidden is not None or model.distilled is not None:
        raise UserError("head_init: probe: requires a head of one linear layer; use head_init=zero")


def fit_head(
    run: Run, recipe: FinetuneRecipe, kind: LabelKind, model: Supervised, subset: np.ndarray, seed: int
) -> None:
    """Let the head begin as a linear probe of the encoder (Kumar et al. 2022, section 4, on fine-tuning that distorts
    features while a random head learns). All processes read features, the main one fits.

    Args:
        run: What the trials share.
        recipe: Of the approach.
        kind: Of label, for this approach.
        model: A classifier on its device, whose head is changed.
        subset: Numbers of the images to train on.
        seed: Of the trial.

    Raises:
        UserError: No image can be read.
    """
    team, chosen = run.team, np.unique(subset)
    read = team.gather(_read_features(run, recipe, kind, model, chosen[team.rank :: team.world]))
    if not read:
        raise UserError("data.train: not one of the chosen images can be read")
    numbers, x, labels = (np.concatenate(parts) for parts in zip(*read, strict=True))
    order = np.argsort(numbers)  # the same for any number of processes
    classes, device = len(run.train.classes), model.mean.device
    weight, bias = team.on_main(lambda: _fitted(x[order], labels[order], classes, device, seed))
    with torch.no_grad():
        model.task.out.weight.copy_(weight)
        model.task.out.bias.copy_(bias)


def _fitted(
    x: np.ndarray, labels: np.ndarray, classes: int, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, D) features and (n,) labels -> (classes, D) and (classes,), of features as the encoder gives them."""
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
    """Of each batch of central crops: (n,) numbers of the images, (n, D) features, (n,) labels."""
    model.eval()
    size = min(AT_ONCE, recipe.optim.max_batch_per_device)
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
