"""Everything a cell of fine-tuning needs before its first step: data, model, optimizer, resume."""

from __future__ import annotations

import copy
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mpp.data.order import MicroBatches, Order
from mpp.data.subsets import balanced, split
from mpp.data.transfer import load_ahead
from mpp.errors import UserError
from mpp.finetuning import lora
from mpp.finetuning.cell import Cell
from mpp.finetuning.job import Finetuning, Run
from mpp.finetuning.micro_loss import MicroLoss
from mpp.finetuning.model import Supervised, build
from mpp.finetuning.progress import Progress
from mpp.recipe.dump import settings_of
from mpp.recipe.finetune import FinetuneRecipe
from mpp.rng import Purpose, torch_seed
from mpp.runs import checkpoint
from mpp.runs.log import RunLog
from mpp.runs.trackers import Trackers
from mpp.training.exchange import accumulation
from mpp.training.nonfinite import BatchNormStatistics
from mpp.training.optimizer import GuardedOptimizer, ParameterGroup, adamw, finetune_groups, unfreeze
from mpp.training.plan import Plan, steps_of
from mpp.training.steps import MicroBatchStream, Pace


class Settings(NamedTuple):
    """What the arm from scratch may do in another way than the pretrained one."""

    base_lr: float
    layer_decay: float
    frozen: float


def prepare_cell(run: Run, cell: Cell) -> Finetuning:
    """Build the model of a cell, choose its images, and load the checkpoint to continue from.

    Raises:
        UserError: Anything the user can correct.
    """
    recipe, team, kind = run.recipe, run.team, run.kind
    optim = recipe.optim
    micro_batches = accumulation(optim.global_batch_size, team.world, optim.max_batch_per_device)
    model = build(recipe, cell.arm, cell.seed, len(run.train.classes))
    subset, held_out = choose_images(run, cell)
    if recipe.balance == "loss":
        model.task.weigh(torch.from_numpy(kind.counts(run.train, subset)))
    settings = settings_of_arm(recipe, cell.arm)
    plan = make_plan(recipe, settings, len(subset), micro_batches)
    adapted = recipe.lora is not None and cell.arm == "pretrained"
    groups = _parameter_groups(recipe, model, settings, adapted=adapted, seed=cell.seed)
    unfreeze(groups, frozen_steps=round(settings.frozen * plan.total_steps), gradual=recipe.unfreeze == "gradual")
    starts = (g["starts_at_step"] for g in groups if "starts_at_step" in g)
    optimizer = adamw(groups, optim.betas)
    averaged = copy.deepcopy(model).requires_grad_(False).to(team.device) if recipe.ema_decay else None
    model.to(team.device)

    progress, resumed = _load_checkpoint(run, cell, model, optimizer, averaged)
    micro_loss = MicroLoss(recipe, team, model, run.train.classes, cell.seed)
    wrapped = team.wrap_model(model)
    guarded = GuardedOptimizer(optimizer, team)
    if team.is_main:
        cell.folder.mkdir(parents=True, exist_ok=True)
    team.wait()
    log = _open_log(run, cell, plan, progress.step)
    log.say(
        f"{len(subset)} labeled images of {len(run.train.classes)} classes, {len(run.val)} to validate; "
        f"{plan.total_steps} steps{plan.warm_up_note}" + (f"; resumed at step {progress.step}" if resumed else "")
    )

    dataset = kind.training_set(run.train, subset, cell.seed)
    sampler = MicroBatches(
        Order([len(subset)], global_batch=optim.global_batch_size, seed=cell.seed, lanes=1),
        seen=progress.step * optim.global_batch_size,
        steps=plan.total_steps - progress.step,
        accumulate=micro_batches,
        rank=team.rank,
        world=team.world,
    )
    loaded = load_ahead(dataset, sampler, workers=recipe.data.workers, device=team.device)
    pace = Pace()
    return Finetuning(
        run=run,
        cell=cell,
        plan=plan,
        subset=subset,
        held_out=held_out,
        dataset=dataset,
        sampler=sampler,
        model=model,
        wrapped=wrapped,
        averaged=averaged,
        adapted=adapted,
        encoder_learns_at=min(starts, default=plan.total_steps),
        optimizer=guarded,
        micro_loss=micro_loss,
        batch_norms=BatchNormStatistics(model, needed=recipe.max_skipped_steps > 0),
        progress=progress,
        micro_batches=MicroBatchStream(loaded, micro_batches, run.watch, pace),
        pace=pace,
        log=log,
    )


def choose_images(run: Run, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the images to train on, with repetitions if classes are balanced by sampling, and of those
    that are judged on the way, if the recipe stops early."""
    recipe, train, seed = run.recipe, run.train, cell.seed
    subset = train.subset(labels_per_class=cell.labels_per_class, fraction=recipe.data.fraction, seed=seed)
    held_out = subset[:0]
    if recipe.early_stop:
        fit, held = split(train.strata[subset], recipe.early_stop.fraction, seed)
        subset, held_out = subset[fit], subset[held]
    if recipe.balance == "sampling":
        subset = subset[balanced(train.strata[subset], seed)]
    return subset, held_out


def settings_of_arm(recipe: FinetuneRecipe, arm: str) -> Settings:
    """Return learning rate, layer decay and frozen part of the steps of an arm."""
    base_lr, layer_decay, frozen = recipe.optim.base_lr, recipe.optim.layer_decay, recipe.frozen
    if arm == "scratch":
        base_lr = recipe.scratch.base_lr or base_lr
        layer_decay = recipe.scratch.layer_decay or layer_decay
        frozen = frozen if recipe.scratch.frozen is None else recipe.scratch.frozen
    return Settings(base_lr, layer_decay, frozen)


def make_plan(recipe: FinetuneRecipe, settings: Settings, images: int, micro_batches: int) -> Plan:
    """Return the plan of a cell that trains on so many images."""
    optim = recipe.optim
    every = {"log": recipe.log_every_steps, "checkpoint": recipe.checkpoint_every_steps}
    every |= {"held_out": recipe.early_stop.every_steps} if recipe.early_stop else {}
    return Plan(
        total_steps=steps_of(optim.epochs, optim.steps, images, optim.global_batch_size),
        warmup_steps=steps_of(optim.warmup_epochs, optim.warmup_steps, images, optim.global_batch_size, least=0),
        global_batch_size=optim.global_batch_size,
        micro_batches=micro_batches,
        base_lr=settings.base_lr,
        min_lr=optim.min_lr,
        every_steps=every,
    )


def _parameter_groups(
    recipe: FinetuneRecipe, model: Supervised, settings: Settings, *, adapted: bool, seed: int
) -> list[ParameterGroup]:
    """Freeze or adapt the encoder as the recipe says, and group the parameters by layer."""
    if settings.frozen == 1:  # its batch norms, too, and no gradient is computed for it
        model.encoder.requires_grad_(False)
    if adapted:
        assert recipe.lora is not None
        torch.manual_seed(torch_seed(seed, Purpose.INIT))
        lora.add(model.encoder, **recipe.lora.model_dump())
    heads = [model.task, *([model.distilled] if model.distilled else [])]
    return finetune_groups(
        model.encoder,
        nn.ModuleList(heads),
        weight_decay=recipe.optim.weight_decay,
        layer_decay=settings.layer_decay,
        head_lr_scale=recipe.optim.head_lr_scale,
    )


def _load_checkpoint(
    run: Run, cell: Cell, model: Supervised, optimizer: torch.optim.Optimizer, averaged: Supervised | None
) -> tuple[Progress, bool]:
    """Load the newest checkpoint of a cell, if there is one: (progress, whether there is).

    Raises:
        UserError: It was made with other data or another encoder.
    """
    path = run.team.on_main(partial(checkpoint.newest, cell.folder / "checkpoints"))
    if path is None:
        return Progress(), False
    state = checkpoint.read_state(path)
    if state["data_fingerprint"] != run.fingerprint:
        raise UserError(f"{path}: the training data or the encoder changed since; start a new run")
    checkpoint.load(path, model, optimizer, averaged)
    return Progress.from_json(state), True


def _open_log(run: Run, cell: Cell, plan: Plan, resumed_at: int) -> RunLog:
    """Open the records of a cell. From now on the status of the cell is the run's, too."""
    active, name = run.team.is_main, cell.folder.name
    settings = settings_of(run.recipe)
    trackers = Trackers(run.recipe.trackers, cell.folder, settings, resumed_at=resumed_at, active=active)
    log = RunLog(
        cell.folder,
        steps=plan.total_steps,
        resumed_at=resumed_at,
        active=active,
        label=f"{name}  ",
        trackers=trackers,
    )
    run.until_the_end.callback(log.close)

    def status_of_both(state: str, **more: object) -> None:
        log.status(state, **more)
        run.status(state, cell=name, **more)

    run.watch.status = status_of_both
    return log
