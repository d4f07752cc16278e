"""Set how long the CNN of `beside: [cnn]` trains: as long as the encoder took, pretraining included."""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mpp.data.loader import READ_AHEAD
from mpp.errors import UserError
from mpp.finetuning.approaches import approaches_of
from mpp.finetuning.batches import load_batches
from mpp.finetuning.job import Run
from mpp.finetuning.label_kind import LabelKind
from mpp.finetuning.micro_loss import MicroLoss
from mpp.finetuning.minutes_before import minutes_before
from mpp.finetuning.model import Supervised
from mpp.finetuning.trial import Trial, read_result, trials_of
from mpp.recipe.finetune import FinetuneRecipe
from mpp.runs.records import write_json
from mpp.training.device_time import DeviceTime, cpu_seconds, unit_of
from mpp.training.optimizer import make_optimizer

LENGTH = "length.json"
LONGEST_WAIT_S = 20.0
"""Longest wait in seconds until the dataloader workers have read ahead."""
STARTING_STEPS, TIMED_STEPS = 3, 8
"""Training steps whose results are discarded: steps to allocate memory and start workers, then steps that are timed."""


@dataclass(frozen=True)
class Length:
    """The length of a trial and its reason. It is measured once and kept, so a resumed trial has the same schedule."""

    steps: int
    minutes_before: float | None
    """Minutes of training the encoder and the teacher of the first approach, before this run. None if they are not
    known for this kind of device."""
    finetuning_minutes: float
    """Minutes of fine-tuning the encoder, with the same seed and labels."""
    step_minutes: float
    """Minutes of one training step of this trial, over all processes."""
    ended_by: str
    """"time" if the encoder's time limits the length, or "max_epochs" if `cnn.max_epochs` is the tighter limit."""

    @property
    def sentence(self) -> str:
        """Return a sentence about the length, for the log."""
        before = self.minutes_before
        known = f"{before:.1f} + " if before else ""
        unknown = (
            "" if before is not None else "; what was trained before on such a device is not known and does not count"
        )
        why = "; cnn.max_epochs ends it" if self.ended_by == "max_epochs" else ""
        return f"{self.steps} steps: the encoder took {known}{self.finetuning_minutes:.1f} minutes{unknown}{why}"


def length_of_trial(
    run: Run, trial: Trial, recipe: FinetuneRecipe, kind: LabelKind, model: Supervised, subset: np.ndarray
) -> Length:
    """Return how many steps take the time of the first approach. It is measured once and kept in the trial's folder.

    Args:
        run: State that all trials share.
        trial: Trial, whose folder exists.
        recipe: Recipe of the trial's approach.
        kind: Kind of label, for this approach.
        model: Model of the trial, on its device. It is not changed.
        subset: Numbers of the images to train on.

    Raises:
        UserError: If the time of the first approach was not kept.
    """
    team, path = run.team, trial.folder / LENGTH
    kept: Length | None = team.on_main(partial(_read, path))
    if kept is not None:
        return kept
    first_approach = approaches_of(run.recipe)[0]
    pairs = (trial.seed, trial.labels_per_class)
    (twin,) = (
        t for t in trials_of(run.recipe) if t.approach == first_approach and (t.seed, t.labels_per_class) == pairs
    )
    result = team.on_main(partial(read_result, twin.folder, run.fingerprint))
    assert result is not None, "trials run in the order of the approaches"
    if math.isnan(result.device_minutes):
        raise UserError(
            f"beside: cnn: what {twin.folder} took is not known: an earlier release trained it, or its checkpoints are "
            "gone; give a new out"
        )
    before = team.on_main(partial(minutes_before, run.recipe, first_approach, unit_of(team)))
    minutes = (before or 0.0) + result.device_minutes
    step_minutes = measure_step(run, trial, recipe, kind, model, subset)
    in_time = max(1, round(minutes / step_minutes))
    most = max(1, round(recipe.cnn.max_epochs * len(subset) / recipe.optim.global_batch_size))
    ended_by = "time" if in_time <= most else "max_epochs"
    length = Length(min(in_time, most), before, result.device_minutes, step_minutes, ended_by)
    if team.is_main:
        write_json(path, asdict(length))
    return length


def measure_step(
    run: Run, trial: Trial, recipe: FinetuneRecipe, kind: LabelKind, model: Supervised, subset: np.ndarray
) -> float:
    """Return the minutes of a training step, over all processes, measured with a copy of the model."""
    team, model = run.team, copy.deepcopy(model)
    micro_loss = MicroLoss(recipe, team, model, run.train.classes, trial.seed)  # the CNN has no unlabeled images
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    optim = recipe.optim
    optimizer = make_optimizer(groups, name=optim.name, betas=optim.betas, encoder=model.encoder)
    wrapped = team.wrap_model(model).train()
    steps = STARTING_STEPS + TIMED_STEPS
    ahead = READ_AHEAD * recipe.data.workers  # extra steps, so that workers still read while steps are timed
    batches = load_batches(run, trial, recipe, kind, subset, first_step=0, steps=steps + ahead)
    clock = DeviceTime(team)
    for step in range(steps):
        run.watch.at(0, "measuring a step")
        if step == STARTING_STEPS:
            _wait_until_read_ahead()
            clock = DeviceTime(team)
        for m in range(batches.micro_batches):
            batch = next(batches.loaded)
            with team.accumulate(wrapped, exchange=m == batches.micro_batches - 1):
                loss = micro_loss(wrapped, batch, int(batch.positions[0]))
                team.backward(loss / batches.micro_batches)
        optimizer.step()  # with a learning rate of 0, which takes the same time
        optimizer.zero_grad()
        loss.item()  # wait for the device
    return max(clock.minutes() / TIMED_STEPS, 1e-9)


def _wait_until_read_ahead() -> None:
    """Wait until dataloader workers have read ahead as far as allowed. After that they read one batch per batch taken.

    The workers are done when the CPU time of the processes stops growing.
    """
    before, until_s = cpu_seconds(), time.monotonic() + LONGEST_WAIT_S
    while time.monotonic() < until_s:
        time.sleep(0.1)
        now = cpu_seconds()
        if now - before < 0.02:
            return
        before = now


def _read(path: Path) -> Length | None:
    try:
        return Length(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
