"""Prepare a pretraining run before its first step: data, model, optimizer, run folder, checkpoint to resume from."""

from __future__ import annotations

import copy
import math
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from mpp.data.batch import Batch
from mpp.data.labeled import open_labeled
from mpp.data.order import MicroBatches, Order, lanes_read_by
from mpp.data.readers import PackedReader
from mpp.data.shards.ahead import Ahead
from mpp.data.shards.reader import ShardImages, evenly, held_out_rows
from mpp.data.transfer import load_ahead
from mpp.data.unreadable import find_coarse_images
from mpp.encoders.resolve import resolve
from mpp.errors import UserError
from mpp.objective.build import build_mask, build_model
from mpp.objective.interfaces import Mask
from mpp.objective.model import MaskedPatchModel
from mpp.parallel.devices import advise_on_cpu, compile_forward, prefer_channels_last
from mpp.parallel.launch import check_devices
from mpp.parallel.liveness import Watch
from mpp.parallel.sharding import M, Whole, shard
from mpp.parallel.signals import StopRequest
from mpp.parallel.team import Team, start_team
from mpp.pretraining.dataset import PretrainDataset, make_crop
from mpp.pretraining.job import Pretraining
from mpp.pretraining.measure import keep_pictures, warn_of_poor_targets
from mpp.pretraining.monitor import OnlineProbe, probe_images
from mpp.pretraining.progress import Progress
from mpp.recipe.dump import settings_of
from mpp.recipe.pretrain import PretrainRecipe
from mpp.recipe.sections import Decoding
from mpp.runs import checkpoint
from mpp.runs.environment import environment
from mpp.runs.folder import DATA, OpenRun, opened
from mpp.runs.log import RunLog
from mpp.runs.pictures import kept_every
from mpp.runs.records import write_json
from mpp.runs.trackers import Trackers
from mpp.training import nonfinite
from mpp.training.batch_norms import batch_norms_of
from mpp.training.device_time import DeviceTime
from mpp.training.exchange import accumulation, describe_batch
from mpp.training.optimizer import GuardedOptimizer, make_optimizer, pretrain_groups
from mpp.training.plan import Plan, steps_of
from mpp.training.steps import MicroBatchStream, Pace

RANGE_IMAGES = 16
"""Number of images whose range of values is checked before the first step."""
HELD_OUT_POSITION = 2**62
"""Position in the random stream of the first held-out image's mask, far beyond any training position."""
LOOKED_AT = 256
"""Number of held-out images on which targets are checked before the first step."""


def prepare(recipe: PretrainRecipe, resume: str, until_the_end: ExitStack) -> Pretraining:
    """Open and check everything, and load the checkpoint to continue from.

    Args:
        recipe: Recipe as the user gave it.
        resume: "never" (the run folder must be new), "auto", "overwrite", or the folder of a checkpoint.
        until_the_end: Stack of contexts that are entered here and left when the run ends, in reverse order.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    check_devices(recipe.devices, os.environ)
    team = start_team(recipe.precision, recipe.trackers, recipe.hang_timeout_s, device=recipe.device)
    stop_request = until_the_end.enter_context(StopRequest())
    watch = until_the_end.enter_context(
        Watch(team.rank, team.world, Path(recipe.out), hang_timeout_s=recipe.hang_timeout_s)
    )
    if recipe.encoder.free_blocks is not None and not recipe.encoder.starts_trained:
        raise UserError(
            "encoder.free_blocks: random weights would stay as they are; start from trained ones, by "
            "encoder.pretrained=true or a folder as encoder.name"
        )
    recipe = resolve(recipe, recipe.encoder.name if recipe.encoder.starts_trained else None, warn=team.is_main)
    optim = recipe.optim
    micro_batches = accumulation(optim.global_batch_size, team.world, optim.max_batch_per_device, recipe.views)

    mask = build_mask(recipe)
    model, mask_grid = build_model(recipe, mask)
    dataset, order = _open_dataset(recipe, team, mask, mask_grid, micro_batches)
    plan = make_plan(recipe, order.epoch_len, micro_batches)
    sharded = recipe.fsdp and team.world > 1
    averaged = copy.deepcopy(model.encoder.model).requires_grad_(False).eval() if recipe.ema_decay else None
    whole = _place_on_device(model, team, sharded=sharded, as_a_whole=(model.guide,) if model.guide is not None else ())
    whole_averaged = None if averaged is None else _place_on_device(averaged, team, sharded=sharded)
    groups = pretrain_groups(model, optim.weight_decay)
    optimizer = make_optimizer(groups, name=optim.name, betas=optim.betas, encoder=model.encoder.model)
    held_out = _held_out_batch(dataset)
    probe = _open_probe(recipe, model)

    # The folder is opened as late as possible, so that an error in a recipe or its data leaves no folder behind.
    run = until_the_end.enter_context(opened(team, recipe, resume, fingerprint=dataset.images.fingerprint))
    watch.at(0, "loading")
    progress = Progress(skills=[math.nan] * len(model.objectives))
    if run.checkpoint is not None:
        checkpoint.load(run.checkpoint, model, optimizer, averaged)
        progress = Progress.from_json(checkpoint.read_state(run.checkpoint))
        progress.probed = progress.probed if probe else None  # drop the result of a probe that the recipe no longer has
        known = progress.probe_at_start is not None  # a fingerprint reads all images of the probe
        if known and (probe is None or probe.fingerprint != progress.probe_fingerprint):
            progress.probe_at_start = None  # it was measured on other images
    if recipe.compile:
        compile_forward(model, team.device)
    sampler = MicroBatches(
        order,
        seen=progress.step * optim.global_batch_size,
        steps=plan.total_steps - progress.step,
        accumulate=micro_batches,
        rank=team.rank,
        world=team.world,
    )
    loaded = load_ahead(dataset, sampler, workers=recipe.data.workers, device=team.device)
    wrapped = team.wrap_model(model, sharded=sharded)
    log = _open_log(recipe, team, plan, run, progress.step)
    until_the_end.callback(log.close)
    watch.status = log.status
    pace = Pace()
    job = Pretraining(
        recipe=recipe,
        team=team,
        plan=plan,
        dataset=dataset,
        sampler=sampler,
        held_out=held_out,
        model=model,
        wrapped=wrapped,
        averaged=averaged,
        sharded=sharded,
        whole=whole,
        whole_averaged=whole_averaged,
        optimizer=GuardedOptimizer(optimizer, team),
        trained=[p for p in model.parameters() if p.requires_grad],
        batch_norms=nonfinite.BatchNormStatistics(model, needed=recipe.max_skipped_steps > 0),
        progress=progress,
        micro_batches=MicroBatchStream(loaded, micro_batches, watch, pace),
        pace=pace,
        device_time=DeviceTime(team, progress.device_minutes),
        probe=probe,
        run=run,
        log=log,
        watch=watch,
        stop_request=stop_request,
    )
    _introduce(job)
    return job


def make_plan(recipe: PretrainRecipe, samples: int, micro_batches: int) -> Plan:
    """Return the plan of a run.

    Args:
        recipe: Recipe of the run.
        samples: Number of samples of an epoch.
        micro_batches: Micro-batches of one step on each process.
    """
    optim = recipe.optim
    total_steps = steps_of(optim.epochs, optim.steps, samples, optim.global_batch_size)
    every = {"log": recipe.log_every_steps, "checkpoint": recipe.checkpoint_every_steps}
    every |= {"skill": recipe.skill_every_steps, "pictures": kept_every(total_steps, recipe.skill_every_steps)}
    every |= {"probe": recipe.probe.every_steps} if recipe.probe else {}
    return Plan(
        total_steps=total_steps,
        warmup_steps=steps_of(optim.warmup_epochs, optim.warmup_steps, samples, optim.global_batch_size, least=0),
        global_batch_size=optim.global_batch_size,
        micro_batches=micro_batches,
        base_lr=optim.base_lr,
        min_lr=optim.min_lr,
        schedule=optim.schedule,
        save_before_decay=True,
        every_steps=every,
        log_first_step=True,
    )


def _open_dataset(
    recipe: PretrainRecipe, team: Team, mask: Mask, mask_grid: tuple[int, int], micro_batches: int
) -> tuple[PretrainDataset, Order]:
    """Open the shards, hold some images out, and set the order of the others."""
    data, optim = recipe.data, recipe.optim
    images = ShardImages(data.shards, key="data.shards", **data.opening())
    train_counts = np.asarray(images.counts) - held_out_rows(images.counts, data.held_out)
    order = Order(
        train_counts,
        global_batch=optim.global_batch_size,
        seed=recipe.seed,
        lanes=data.lanes,
        window=data.window,
        views=recipe.views,
    )
    lanes = lanes_read_by(team.ranks_here(), order, accumulate=micro_batches, world=team.world)
    dataset = PretrainDataset(
        images,
        make_crop(data),
        mask,
        mask_grid,
        recipe.seed,
        train_counts,
        optim.global_batch_size,
        recipe.masks_per_image,
        Ahead(images, order, lanes),
    )
    return dataset, order


def _place_on_device(model: M, team: Team, *, sharded: bool, as_a_whole: tuple[nn.Module, ...] = ()) -> Whole[M]:
    """Move a model to the device, or shard it over the processes, except for the modules `as_a_whole`.

    Returns:
        Access to a copy with all its weights.
    """
    whole = Whole(model, sharded=sharded)
    if sharded:
        shard(model, team.device, whole=as_a_whole)
    else:
        prefer_channels_last(model)
        model.to(team.device)
    return whole


def _held_out_batch(dataset: PretrainDataset) -> Batch:
    """Read the held-out images, centre-cropped, each with the mask that it has in every run of this seed.

    Raises:
        UserError: If no held-out image can be read, because then the other images most likely cannot be read either.
    """
    rows = [
        (shard, row)
        for shard, (first, end) in enumerate(zip(dataset.train_counts, dataset.images.counts, strict=True))
        for row in range(int(first), int(end))
    ]
    batch = dataset.batch([(HELD_OUT_POSITION + i, s, r) for i, (s, r) in enumerate(rows)], centre=True)
    if batch.replaced == len(rows):
        raise UserError(f"data.shards: not one of {len(rows)} held-out images can be read; the first: {batch.bad[0]}")
    return batch


def _open_probe(recipe: PretrainRecipe, model: MaskedPatchModel) -> OnlineProbe | None:
    """Read the images of the online probe, on every process alike, so that none waits for another.

    Raises:
        UserError: If there are too few classes or images, or if none can be read.
    """
    keys, data = recipe.probe, recipe.data
    if keys is None:
        return None
    train = open_labeled(keys.train, key="probe.train", classes=None, **data.opening())
    val = open_labeled(keys.val, key="probe.val", classes=train.classes, **data.opening())
    if len(train.classes) < 2 or not len(val.labels):
        raise UserError("probe: requires at least two classes in probe.train, and images in probe.val")
    reading = data.decoding()
    size, most, seed = data.image_size, keys.images, recipe.seed
    learned = probe_images(train, size, most, seed, "probe.train", **reading)
    judged = probe_images(val, size, most, seed, "probe.val", **reading)
    return OnlineProbe(learned, judged, len(train.classes), keys.weight_decay, model.mean, model.std)


def _open_log(recipe: PretrainRecipe, team: Team, plan: Plan, run: OpenRun, resumed_at: int) -> RunLog:
    trackers = Trackers(recipe.trackers, run.out, settings_of(recipe), resumed_at=resumed_at, active=team.is_main)
    return RunLog(run.out, steps=plan.total_steps, resumed_at=resumed_at, active=team.is_main, trackers=trackers)


def _introduce(job: Pretraining) -> None:
    """Write the records that precede the first step.

    These are env.json, data.json, the opening lines of the log, warnings, and the pictures of the untrained model.
    """
    recipe, team, images, log = job.recipe, job.team, job.dataset.images, job.log
    if team.is_main:
        write_json(job.run.out / "env.json", environment())
        write_json(
            job.run.out / DATA,
            {
                "fingerprint": images.fingerprint,
                "shards": len(images.names),
                "images": int(sum(job.dataset.train_counts)),
                "held_out": len(job.held_out.images),
                "left_out": images.left_out.found,
            },
        )
    log.say(_opening_line(job))
    if team.device.type == "cpu":
        for advice in advise_on_cpu(recipe.precision, team.world):
            log.say(f"note: {advice}")
    if images.left_out:
        log.say(f"note: data.shards: {images.left_out}")
    for line in team.on_main(partial(_look_at_range, images, recipe.data.decoding())):
        log.say(f"warning: {line}")
    for line in job.held_out.bad:
        log.say(f"unreadable, held out: {line}")
    if batch_norms_of(job.model.encoder) and team.world > 1:
        log.say("note: this encoder's batch norms see each process's share: another number of processes differs")
    comparing = ["agreement"] if recipe.agreement else []
    comparing += [f"target {o.name}" for o in job.model.objectives if o.target.compares_images]
    if comparing and team.world * job.plan.micro_batches > 1:
        which = " and ".join(comparing)
        log.say(f"note: another division into micro-batches differs: it changes which images are compared by {which}")
    with job.whole.on_device(team.device) as shown:
        for line in warn_of_poor_targets(shown, job.held_out.images[:LOOKED_AT].to(team.device)):
            log.say(f"warning: {line}")
        if job.progress.step == 0 and team.is_main:
            keep_pictures(team, shown, job.held_out, recipe.reconstruct_images, log, 0)


def _opening_line(job: Pretraining) -> str:
    """Return the first line of the log: images, steps, number of trained parameters."""
    plan, dataset = job.plan, job.dataset
    shards, parameters = len(dataset.images.names), sum(p.numel() for p in job.trained) / 1e6
    line = (
        f"training on {sum(dataset.train_counts):,} images in {shards:,} shard{'s' * (shards != 1)}, "
        f"{len(job.held_out.images):,} more held out; {plan.total_steps:,} steps of "
        f"{describe_batch(plan.global_batch_size, job.team.world, plan.micro_batches, job.recipe.views)}; "
        f"{parameters:.2f} M parameters trained{plan.warm_up_note}"
    )
    if job.run.checkpoint:
        line += f"; resumed at step {job.progress.step}"
        line += ", which is the last: nothing is left to do" if job.progress.step >= plan.total_steps else ""
    return line


def _look_at_range(images: ShardImages, decoding: Decoding) -> list[str]:
    """Return warnings about the range of values of a few images; see `find_coarse_images`."""
    chosen = evenly(sum(images.counts), RANGE_IMAGES)
    return find_coarse_images(PackedReader(images, few=True), chosen, "data.shards", decoding)
