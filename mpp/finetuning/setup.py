"""Prepare a fine-tuning trial for its first step: data, model, optimizer, resume."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mpp.data.subsets import balanced, split
from mpp.errors import UserError
from mpp.finetuning import lora
from mpp.finetuning.approaches import recipe_of_approach
from mpp.finetuning.batches import load_batches
from mpp.finetuning.equal_time import length_of_trial
from mpp.finetuning.head_start import fit_head
from mpp.finetuning.job import Finetuning, Run
from mpp.finetuning.micro_loss import MicroLoss, UnlabeledInputs
from mpp.finetuning.model import Supervised, build
from mpp.finetuning.open_labels import open_label_kind
from mpp.finetuning.progress import Progress
from mpp.finetuning.trial import Trial
from mpp.finetuning.unlabeled import first_unlabeled_step
from mpp.parallel.devices import prefer_channels_last
from mpp.recipe.dump import settings_of
from mpp.recipe.finetune import FinetuneRecipe
from mpp.rng import Purpose, torch_seed
from mpp.runs import checkpoint
from mpp.runs.log import RunLog
from mpp.runs.trackers import Trackers
from mpp.training.device_time import DeviceTime
from mpp.training.exchange import accumulation
from mpp.training.nonfinite import BatchNormStatistics
from mpp.training.optimizer import GuardedOptimizer, ParameterGroup, finetune_groups, make_optimizer, unfreeze
from mpp.training.plan import Plan, steps_of
from mpp.training.steps import MicroBatchStream, Pace


def prepare_trial(run: Run, trial: Trial) -> Finetuning:
    """Build the model of a trial, choose its images, and load its checkpoint if there is one.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    recipe, team = recipe_of_approach(run.recipe, trial.approach), run.team
    device_time = DeviceTime(team)
    kind = open_label_kind(recipe)
    subset, held_out = choose_images(run, trial)
    if team.is_main:
        trial.folder.mkdir(parents=True, exist_ok=True)
    team.wait()
    model = build(recipe, trial.approach, trial.seed, len(run.train.classes))
    prefer_channels_last(model)
    if recipe.balance == "loss":
        model.task.weigh(torch.from_numpy(kind.counts(run.train, subset)))
    kept = run.team.on_main(partial(checkpoint.newest, trial.folder / "checkpoints"))
    if recipe.head_init == "probe" and kept is None:
        fit_head(run, recipe, kind, model.to(team.device), subset, trial.seed)
    length = None
    if trial.approach == "cnn":
        length = length_of_trial(run, trial, recipe, kind, model.to(team.device), subset)
    plan = make_plan(recipe, len(subset), team.world, length.steps if length else None)
    groups = parameter_groups(recipe, model, trial.seed)
    unfreeze(groups, frozen_steps=round(recipe.frozen * plan.total_steps), gradual=recipe.unfreeze == "gradual")
    starts = (g["starts_at_step"] for g in groups if "starts_at_step" in g)
    optim = recipe.optim
    optimizer = make_optimizer(groups, name=optim.name, betas=optim.betas, encoder=model.encoder)
    averaged = copy.deepcopy(model).requires_grad_(False).to(team.device) if recipe.ema_decay else None
    model.to(team.device)

    progress = _load_checkpoint(run, kept, model, optimizer, averaged) if kept else Progress()
    device_time.earlier_minutes = progress.device_minutes
    unlabeled = None
    if recipe.unlabeled and averaged is not None:
        counts = kind.counts(run.train, np.arange(len(run.train))).tolist()
        unlabeled = UnlabeledInputs(averaged, plan.total_steps, counts, progress.mean_prediction)
    micro_loss = MicroLoss(recipe, team, model, run.train.classes, trial.seed, unlabeled)
    wrapped = team.wrap_model(model)
    guarded = GuardedOptimizer(optimizer, team)
    log = _open_log(run, trial, plan, progress.step)
    log.say(
        f"{len(subset)} labeled images of {len(run.train.classes)} classes, {len(run.val)} to validate; "
        f"{plan.total_steps} steps{plan.warm_up_note}" + (f"; resumed at step {progress.step}" if kept else "")
    )

    if length:
        log.say(length.sentence)
    if recipe.unlabeled and recipe.unlabeled.start:
        log.say(f"unlabeled images from step {first_unlabeled_step(recipe, plan.total_steps) + 1} on")
    left = plan.total_steps - progress.step
    batches = load_batches(run, trial, recipe, kind, subset, first_step=progress.step, steps=left)
    pace = Pace()
    return Finetuning(
        run=run,
        trial=trial,
        recipe=recipe,
        kind=kind,
        plan=plan,
        subset=subset,
        held_out=held_out,
        dataset=batches.dataset,
        sampler=batches.sampler,
        model=model,
        wrapped=wrapped,
        averaged=averaged,
        encoder_learns_at=min(starts, default=plan.total_steps),
        optimizer=guarded,
        micro_loss=micro_loss,
        batch_norms=BatchNormStatistics(model, needed=recipe.max_skipped_steps > 0),
        progress=progress,
        micro_batches=MicroBatchStream(batches.loaded, plan.micro_batches, run.watch, pace),
        pace=pace,
        device_time=device_time,
        log=log,
    )


def choose_images(run: Run, trial: Trial) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the images to train on, and those of the held-out images.

    The first contain repetitions if classes are balanced by sampling. The second are judged during training if the
    recipe stops early, and are empty otherwise.
    """
    recipe, train, seed = run.recipe, run.train, trial.seed
    subset = train.subset(labels_per_class=trial.labels_per_class, fraction=recipe.data.fraction, seed=seed)
    held_out = subset[:0]
    if recipe.early_stop:
        fit, held = split(train.strata[subset], recipe.early_stop.fraction, seed)
        subset, held_out = subset[fit], subset[held]
    if recipe.balance == "sampling":
        subset = subset[balanced(train.strata[subset], seed)]
    return subset, held_out


def make_plan(recipe: FinetuneRecipe, images: int, world: int, steps: int | None) -> Plan:
    """Return the plan of a trial.

    Args:
        recipe: Recipe of the approach.
        images: Number of images to train on, with repetitions.
        world: Number of processes.
        steps: Length of training, if it differs from the recipe's. The warm-up stays the same fraction of it. None
            means the recipe's length.

    Raises:
        UserError: If the global batch cannot be divided among the processes.
    """
    optim = recipe.optim
    planned_steps = steps_of(optim.epochs, optim.steps, images, optim.global_batch_size)
    total_steps = steps_of(optim.epochs, optim.steps, images, optim.global_batch_size, least=max(1, optim.min_steps))
    warmup_steps = steps_of(optim.warmup_epochs, optim.warmup_steps, images, optim.global_batch_size, least=0)
    if optim.warmup_steps is None:  # its epochs become longer with those of the run
        warmup_steps = round(total_steps * warmup_steps / planned_steps)
    if steps is not None:
        total_steps, warmup_steps = steps, round(steps * warmup_steps / total_steps)
    every = {"log": recipe.log_every_steps, "checkpoint": recipe.checkpoint_every_steps}
    every |= {"held_out": recipe.early_stop.every_steps} if recipe.early_stop else {}
    return Plan(
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        global_batch_size=optim.global_batch_size,
        micro_batches=accumulation(optim.global_batch_size, world, optim.max_batch_per_device),
        base_lr=optim.base_lr,
        min_lr=optim.min_lr,
        schedule=optim.schedule,
        every_steps=every,
    )


def parameter_groups(recipe: FinetuneRecipe, model: Supervised, seed: int) -> list[ParameterGroup]:
    """Freeze the encoder or add adapters, according to the recipe of the approach, and group parameters by layer."""
    if recipe.frozen == 1:  # no gradients for the encoder, including its batch norms, are computed
        model.encoder.requires_grad_(False)
    if recipe.lora:
        torch.manual_seed(torch_seed(seed, Purpose.INIT))
        lora.add(model.encoder, **recipe.lora.model_dump())
    heads = [model.task, *([model.distilled] if model.distilled else [])]
    return finetune_groups(
        model.encoder,
        nn.ModuleList(heads),
        weight_decay=recipe.optim.weight_decay,
        layer_decay=recipe.optim.layer_decay,
        head_lr_scale=recipe.optim.head_lr_scale,
    )


def _load_checkpoint(
    run: Run, path: Path, model: Supervised, optimizer: torch.optim.Optimizer, averaged: Supervised | None
) -> Progress:
    """Load a checkpoint of a trial.

    Raises:
        UserError: If the checkpoint was made with other data or another encoder.
    """
    state = checkpoint.read_state(path)
    if state["data_fingerprint"] != run.fingerprint:
        raise UserError(f"{path}: the training data or the encoder changed since; start a new run")
    checkpoint.load(path, model, optimizer, averaged)
    return Progress.from_json(state)


def _open_log(run: Run, trial: Trial, plan: Plan, resumed_at: int) -> RunLog:
    """Open the log and the trackers of a trial. From then on, the watch writes the status of trial and run."""
    active, name = run.team.is_main, trial.folder.name
    settings = settings_of(run.recipe)
    trackers = Trackers(run.recipe.trackers, trial.folder, settings, resumed_at=resumed_at, active=active)
    log = RunLog(
        trial.folder,
        steps=plan.total_steps,
        resumed_at=resumed_at,
        active=active,
        label=f"{name}  ",
        trackers=trackers,
    )
    run.until_the_end.callback(log.close)

    def status_of_both(state: str, **more: object) -> None:
        log.status(state, **more)
        run.status(state, trial=name, **more)

    run.watch.status = status_of_both
    return log
