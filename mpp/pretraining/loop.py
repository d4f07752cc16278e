"""Masked-patch pretraining: the loop, from top to bottom."""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpp.data.batch import Batch
from mpp.data.crop import Crop
from mpp.data.labeled import open_labeled
from mpp.data.loader import batches
from mpp.data.order import MicroBatches, Order, lanes_read_by
from mpp.data.readers import PackedReader
from mpp.data.shards.ahead import Ahead
from mpp.data.shards.reader import ShardImages, evenly, held_out_rows
from mpp.data.transfer import on_device
from mpp.data.unreadable import count_unreadable, find_coarse_images
from mpp.encoders.folder import pool_patches, save_encoder, trained_by
from mpp.encoders.images_of import normalised_as
from mpp.errors import UserError
from mpp.objective.build import build_mask, build_model
from mpp.objective.model import MaskedPatchModel
from mpp.parallel import faults
from mpp.parallel.devices import compile_forward, cores_in_use, cpu_has_bf16
from mpp.parallel.liveness import SAVING, Watch
from mpp.parallel.sharding import Whole, shard, whole_value
from mpp.parallel.signals import StopRequest
from mpp.parallel.team import gather_objects, on_main, ranks_here, start_accelerator
from mpp.pretraining.dataset import PretrainDataset
from mpp.pretraining.measure import keep_pictures, measure_skills, warn_of_poor_targets
from mpp.pretraining.monitor import OnlineProbe, Probed, Spread, probe_images
from mpp.recipe.dump import settings_of
from mpp.recipe.pretrain import PretrainRecipe
from mpp.rng import Purpose, torch_seed
from mpp.runs import checkpoint
from mpp.runs.environment import environment
from mpp.runs.folder import DATA, opened
from mpp.runs.log import RunLog
from mpp.runs.pictures import kept_every
from mpp.runs.records import write_json
from mpp.runs.symptoms import COLLAPSED_FEATURE_SHARE, COLLAPSED_TARGET_SHARE, Measured, collapsed, flat_since
from mpp.runs.trackers import Trackers
from mpp.training import nonfinite
from mpp.training.exchange import Exchange, accumulation
from mpp.training.optimizer import adamw, pretrain_groups, scheduled_lr, set_lr, steps_of, update_if

RANGE_IMAGES = 16
"""Images whose range of values is looked at before the first step."""
HELD_OUT_POSITION = 2**62
"""Where the masks of held-out images are drawn: far beyond any training position."""


@dataclass(frozen=True)
class PretrainResult:
    """What `pretrain` returns."""

    out: Path
    state: str
    """"finished", or "stopped" by a signal with a checkpoint to go on from."""
    step: int
    loss: float
    """Of the last step, over all processes."""
    skill: float
    """1 - loss / loss of the trivial predictor, on held-out images; the last one measured."""
    encoder: Path | None
    """The timm folder of the encoder; None until the run is finished."""
    signal: str | None = None
    """The name of the signal that stopped the run."""


def pretrain(recipe: PretrainRecipe, resume: str = "never") -> PretrainResult:
    """Run a recipe. resume: "never" (the run folder must be new), "auto", or the folder of a checkpoint.

    UserError for everything the user can correct.
    """
    with ExitStack() as until_the_end:
        return _pretrain(recipe, resume, until_the_end)


def _pretrain(recipe: PretrainRecipe, resume: str, until_the_end: ExitStack) -> PretrainResult:
    accelerator = start_accelerator(recipe.precision, recipe.trackers, recipe.hang_timeout_s)
    rank, world = accelerator.process_index, accelerator.num_processes
    stop_request = until_the_end.enter_context(StopRequest())
    watch = until_the_end.enter_context(Watch(rank, world, Path(recipe.out), hang_timeout_s=recipe.hang_timeout_s))
    if recipe.encoder.pretrained or Path(recipe.encoder.name).is_dir():
        own = normalised_as(recipe.encoder.name, recipe.data, warn=accelerator.is_main_process)
        recipe = recipe.model_copy(update={"data": own})
    data, optim = recipe.data, recipe.optim
    data.check_nodata()
    accumulate = accumulation(optim.global_batch_size, world, optim.max_batch_per_device)

    # ---- model, data, optimizer
    model, mask_grid = build_model(recipe)
    images = ShardImages(data.shards, key="data.shards", **data.opening())
    held_out = held_out_rows(images.counts, data.held_out)
    counts = np.asarray(images.counts) - held_out
    order = Order(counts, global_batch=optim.global_batch_size, seed=recipe.seed, lanes=data.lanes, window=data.window)
    crop = Crop(
        data.image_size,
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        flip=data.flip,
        **data.decoding(),
    )
    mask = build_mask(recipe)
    here = ranks_here(rank, world)
    ahead = Ahead(images, order, lanes_read_by(here, order, accumulate=accumulate, world=world))
    dataset = PretrainDataset(images, crop, mask, mask_grid, recipe.seed, counts, optim.global_batch_size, ahead)
    total_steps = steps_of(optim.epochs, optim.steps, order.epoch_len, optim.global_batch_size)
    warmup_steps = steps_of(optim.warmup_epochs, optim.warmup_steps, order.epoch_len, optim.global_batch_size, least=0)
    lr_scale = optim.global_batch_size / 256
    objectives: Any = model.objectives
    sharded = recipe.fsdp and world > 1
    whole = Whole(model, sharded=sharded)
    if sharded:
        shard(model, accelerator.device, whole=(model.guide,) if model.guide is not None else ())
    else:
        model.to(accelerator.device)
    optimizer: Any = adamw(pretrain_groups(model, optim.weight_decay), optim.betas)
    trained = [p for p in model.parameters() if p.requires_grad]

    held_out_batch = _held_out_batch(dataset, counts, held_out)
    probe = _probe(recipe, model) if recipe.probe else None

    # ---- run folder and resume
    run = until_the_end.enter_context(opened(accelerator, recipe, resume, fingerprint=images.fingerprint))
    watch.at(0, "loading")
    state: dict[str, Any] = {"seen": 0, "bad": 0, "skipped": 0, "loss": None, "skills": [None] * len(objectives)}
    state |= {"collapse": {}, "features": None, "history": [], "probed": None}
    start_step = 0
    if run.checkpoint is not None:
        checkpoint.load(run.checkpoint, model, optimizer)
        state |= checkpoint.read_state(run.checkpoint)
        start_step = state["step"]
    if recipe.compile:
        compile_forward(model, accelerator.device)
    prepared: Any = accelerator.prepare_model(model, evaluation_mode=sharded)  # which would wrap it once more
    optimizer = accelerator.prepare_optimizer(optimizer)
    settings = settings_of(recipe)
    log = RunLog(
        run.out,
        steps=total_steps,
        resumed_at=start_step,
        active=accelerator.is_main_process,
        trackers=Trackers(accelerator, recipe.trackers, run.out, settings, start_step),
    )
    until_the_end.callback(log.close)
    watch.status = log.status
    if accelerator.is_main_process:
        write_json(run.out / "env.json", environment())
        write_json(
            run.out / DATA,
            {
                "fingerprint": images.fingerprint,
                "shards": len(images.names),
                "images": int(sum(counts)),
                "held_out": int(held_out.sum()),
                "left_out": images.left_out.found,
            },
        )
    log.say(
        f"{sum(counts)} images in {len(images.names)} shards, {int(held_out.sum())} more held out; "
        f"{total_steps} steps of {optim.global_batch_size} "
        f"({world} × {accumulate} × {optim.global_batch_size // world // accumulate}), "
        f"{sum(p.numel() for p in trained) / 1e6:.2f} M parameters trained"
        + ("; the warm-up lasts longer: the full learning rate is never reached" if warmup_steps > total_steps else "")
        + (f"; resumed at step {start_step}" if run.checkpoint else "")
        + (", which is the last: nothing is left to do" if run.checkpoint and start_step >= total_steps else "")
    )
    if recipe.precision == "auto" and accelerator.device.type == "cpu" and cpu_has_bf16():
        log.say("note: this CPU has instructions for bf16: precision=bf16 may take half the time")
    if taken := cores_in_use(accelerator):
        log.say(f"note: {taken}")
    if images.left_out:
        log.say(f"note: data.shards: {images.left_out}")
    for line in on_main(accelerator, partial(_look_at_range, images, data.decoding())):
        log.say(f"warning: {line}")
    for line in held_out_batch.bad:
        log.say(f"unreadable, held out: {line}")
    if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.encoder.modules()) and world > 1:
        log.say("note: this encoder's batch norms see each process's share: another number of processes differs")
    with whole.now(accelerator.device) as shown:
        for line in warn_of_poor_targets(shown, held_out_batch.images[:256].to(accelerator.device)):
            log.say(f"warning: {line}")
        if start_step == 0 and accelerator.is_main_process:
            keep_pictures(accelerator, shown, held_out_batch, recipe.reconstruct_images, log, start_step)

    # ---- the loop
    step, bad, skipped = start_step, int(state["bad"]), int(state["skipped"])
    loss = math.nan if state["loss"] is None else float(state["loss"])
    skills = [math.nan if value is None else float(value) for value in state["skills"]]
    skill, collapse = skills[0], state["collapse"]
    features = Spread(*state["features"]) if state["features"] else None
    history = [Measured(*m) for m in state["history"]]
    probed = Probed(*state["probed"]) if probe and state["probed"] else None
    sampler = MicroBatches(
        order,
        seen=start_step * optim.global_batch_size,
        steps=total_steps - start_step,
        accumulate=accumulate,
        rank=rank,
        world=world,
    )
    cuda = accelerator.device.type == "cuda"
    loaded = batches(dataset, sampler, workers=data.workers, pin_memory=cuda)
    stream_of_batches = on_device(loaded, accelerator.device) if cuda else loaded
    pictures_every = kept_every(total_steps, recipe.skill_every_steps)
    prepared.train()
    log.status("running", step=step)
    window = _Window()
    stop_request.listen()
    statistics = nonfinite.Statistics(model, needed=recipe.max_skipped_steps > 0)
    underway: deque[_Underway] = deque()
    stopping = False
    while step < total_steps:
        faults.point("train.step_begins")
        micro_losses: list[torch.Tensor] = []
        bad_lines: list[str] = []
        replaced = 0
        statistics.remember()
        for m in range(accumulate):
            watch.at(step, "reading images")
            waited = time.monotonic()
            batch = next(stream_of_batches)
            window.waited_s += time.monotonic() - waited
            bad_lines += batch.bad
            replaced += batch.replaced
            watch.at(step, "computing")
            # dropout and drop path draw from here; after the batch, since a loader that starts draws, too
            torch.manual_seed(torch_seed(recipe.seed, Purpose.STEP, int(batch.positions[0])))
            last = m == accumulate - 1
            # of a sharded model each micro-batch's gradients are exchanged: a process has no room for all of them
            with nullcontext() if last or sharded else accelerator.no_sync(prepared):
                losses = prepared(batch.images, batch.mask, batch.noise, batch.hidden_units) / accumulate
                accelerator.backward((losses * model.weights).sum())
            micro_losses.append(losses.detach())
        grad_norm = whole_value(accelerator.clip_grad_norm_(trained, optim.clip_grad_norm or math.inf))

        # One exchange a step: the mean losses, unreadable images, whether anyone was asked to stop. The device itself
        # leaves out an update whose loss or gradient is not finite; the norm is the same everywhere, as gradients are.
        watch.at(step, "exchanging losses")
        own_losses = torch.stack(micro_losses).sum(0) / world
        exchange = Exchange(accelerator, own_losses, [replaced, bool(stop_request)], grad_norm)
        made = exchange.summed.isfinite().all() & grad_norm.isfinite()
        statistics.put_back(unless=made)
        underway.append(_Underway(step, exchange, micro_losses, bad_lines))

        # What came of a step is read one step later, when the device has long done it and is busy with the next: nobody
        # waits. At once where it is about to be logged or saved. Weights are then as they were before the step, if it
        # was left out: it is kept as it was.
        is_last = step + 1 == total_steps
        due = {
            "probe": recipe.probe is not None and (is_last or (step + 1) % recipe.probe.every_steps == 0),
            "skill": is_last or (step + 1) % recipe.skill_every_steps == 0,
            "pictures": is_last or (step + 1) % pictures_every == 0,
        }
        logged = due["probe"] or due["skill"] or step == 0 or (step + 1) % recipe.log_every_steps == 0
        saved = is_last or (step + 1) % recipe.checkpoint_every_steps == 0
        known_now = logged or saved or (world == 1 and bool(stop_request))
        while len(underway) > (0 if known_now or stopping else 1):
            past = underway.popleft()
            *each_loss, new_bad, to_stop, norm = past.exchange.read()
            stopping = stopping or bool(to_stop)
            loss = sum(o.weight * value for o, value in zip(objectives, each_loss, strict=True))
            seen = past.step * optim.global_batch_size
            if not (math.isfinite(norm) and math.isfinite(loss)):
                skipped += 1
                keys = sampler.keys(seen)
                record = {
                    "seeds": [torch_seed(recipe.seed, Purpose.STEP, of_batch[0][0]) for of_batch in keys],
                    "losses": [[str(v * accumulate) for v in micro.tolist()] for micro in past.micro_losses],
                    "samples": [[images.name(s, r) for _, s, r in of_batch] for of_batch in keys],
                }
                what = f"step {past.step}: loss {loss}, gradient norm {norm}"
                allowed = {"skipped": skipped, "allowed": recipe.max_skipped_steps}
                log.say(
                    nonfinite.left_out(
                        accelerator, run.out, past.step, model, dataset, keys, record, what=what, **allowed
                    )
                )
            if new_bad:
                lines = gather_objects(accelerator, past.bad_lines)  # each process knows of its own alone
                most = data.max_bad_fraction
                bad = count_unreadable(bad, int(new_bad), lines, seen + optim.global_batch_size, most, log)

        lr = lr_scale * scheduled_lr(
            step,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            lr=optim.base_lr,
            min_lr=optim.min_lr,
        )
        set_lr(optimizer, lr)
        update_if(made, optimizer)
        optimizer.zero_grad(set_to_none=True)
        step += 1
        model.after_step(step, total_steps, made)
        window.steps += 1
        log.step()

        watch.at(step, SAVING)
        if any(due.values()):
            with whole.now(accelerator.device) as shown:
                if probe and due["probe"]:
                    shown.eval()
                    probed = probe(shown.encoder.model, accelerator.device)
                    shown.train()
                if due["skill"]:
                    skills, collapse, features = measure_skills(accelerator, shown, held_out_batch)
                if due["pictures"] and accelerator.is_main_process:
                    keep_pictures(accelerator, shown, held_out_batch, recipe.reconstruct_images, log, step)
        if due["skill"]:
            skill = skills[0]
            if features and collapsed(*features, COLLAPSED_FEATURE_SHARE):
                log.say(
                    f"warning: the encoder's features collapse: {features.share:.2%} of them depends on the image, "
                    f"effective rank {features.rank:.1f}. Try a lower optim.base_lr, or more warm-up"
                )
            for name, (rank_of_target, share) in collapse.items():
                if collapsed(rank_of_target, share, COLLAPSED_TARGET_SHARE):
                    log.say(
                        f"warning: target {name} collapses: {share:.1%} of it depends on the image, effective rank "
                        f"{rank_of_target:.1f}. Try a higher decay, a lower optim.base_lr, or more warm-up"
                    )
            already = flat_since(history)
            if math.isfinite(skill):
                history.append(Measured(step, skill, probed.accuracy if probed else None))
            since = flat_since(history)
            if since is not None and already is None and not is_last:
                log.say(f"warning: neither skill nor probe has risen since step {since}; see metrics.jsonl")
        if logged or stopping:
            told: dict[str, Any] = {"step": step, "seen": step * optim.global_batch_size, "loss": loss}
            if len(objectives) > 1:
                told |= {f"loss_{o.name}": v for o, v in zip(objectives, each_loss, strict=True)}
            if due["skill"]:  # what was measured now stands in this record alone
                told["skill"] = skill
                if len(objectives) > 1:
                    told |= {f"skill_{o.name}": v for o, v in zip(objectives, skills, strict=True)}
                told |= {f"target_rank_{name}": v for name, (v, _) in collapse.items()}
                told |= {f"target_share_{name}": v for name, (_, v) in collapse.items()}
                told |= {f"feature_{k}": v for k, v in features._asdict().items()} if features else {}
            if due["probe"] and probed:
                told |= {f"probe_{k}": v for k, v in probed._asdict().items()}
            told |= {"lr": lr, "grad_norm": norm, **window.rates(optim.global_batch_size), "skipped_images": bad}
            log.metrics(told | ({"skipped_steps": skipped} if skipped else {}))
        if saved or stopping:
            state = {
                "seen": step * optim.global_batch_size,
                "bad": bad,
                "skipped": skipped,
                "loss": loss if math.isfinite(loss) else None,
                "skills": [None if math.isnan(value) else value for value in skills],
                "collapse": collapse,
                "features": [*features] if features else None,
                "history": [[*m] for m in history],
                "probed": [*probed] if probed else None,
                "data_fingerprint": images.fingerprint,
            }
            save = partial(checkpoint.save_together, accelerator, keep=recipe.keep_checkpoints)
            try:
                save(run.out / "checkpoints", step, model, optimizer, state)
                log.status("running", step=step)
            except UserError as error:
                if is_last or stopping or recipe.if_unsaved == "stop":
                    raise
                log.say(f"warning: {error}; going on, as if_unsaved says")
        if stopping and not is_last:
            why = stop_request.by or "a signal to another process"
            by = stop_request.of_all(accelerator)
            log.say(f"stopped at step {step} by {why}; go on with --resume auto")
            log.status("stopped", step=step, why=why)
            return PretrainResult(run.out, "stopped", step, loss, skill, None, by)

    # ---- the encoder, as a timm folder
    encoder, origin = run.out / "encoder", trained_by(recipe)
    said = {"step": step, "loss": loss, "skill": skill}
    with whole.now(accelerator.device) as shown:
        pool_patches(shown.encoder.model)
        on_main(accelerator, partial(save_encoder, shown.encoder.model, encoder, origin, said))
    log.say(f"encoder: {encoder}")
    log.status("finished", step=step)
    return PretrainResult(run.out, "finished", step, loss, skill, encoder)


@dataclass(frozen=True)
class _Underway:
    """A step of which nobody has asked yet what came of it."""

    step: int
    """Steps before it."""
    exchange: Exchange
    micro_losses: list[torch.Tensor]
    bad_lines: list[str]


@dataclass
class _Window:
    """Time since the last logged line."""

    began: float = 0.0
    waited_s: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    def rates(self, global_batch: int) -> dict[str, float]:
        elapsed = max(time.monotonic() - self.began, 1e-9)
        found = {"images_per_s": self.steps * global_batch / elapsed, "data_wait": self.waited_s / elapsed}
        self.began, self.waited_s, self.steps = time.monotonic(), 0.0, 0
        return found


def _probe(recipe: PretrainRecipe, model: MaskedPatchModel) -> OnlineProbe:
    """UserError where the images are not as they must be. On every process alike, so that none waits for another."""
    keys, data = recipe.probe, recipe.data
    assert keys is not None
    train = open_labeled(keys.train, key="probe.train", classes=None, **data.opening())
    val = open_labeled(keys.val, key="probe.val", classes=train.classes, **data.opening())
    if len(train.classes) < 2 or not len(val.labels):
        raise UserError("probe: wants two classes at least in probe.train, and images in probe.val")
    reading = data.decoding()
    size, most, seed = data.image_size, keys.images, recipe.seed
    learned = probe_images(train, size, most, seed, "probe.train", **reading)
    judged = probe_images(val, size, most, seed, "probe.val", **reading)
    return OnlineProbe(learned, judged, len(train.classes), keys.weight_decay, model.mean, model.std)


def _held_out_batch(dataset: PretrainDataset, counts: np.ndarray, held_out: np.ndarray) -> Batch:
    """The held-out images, centre-cropped, each with the mask it has in every run of this seed.

    UserError where not one of them can be read: most likely nor can the others.
    """
    rows = [(s, int(counts[s]) + i) for s in range(len(counts)) for i in range(int(held_out[s]))]
    batch = dataset.batch([(HELD_OUT_POSITION + i, s, r) for i, (s, r) in enumerate(rows)], centre=True)
    if batch.replaced == len(rows):
        raise UserError(f"data.shards: not one of {len(rows)} held-out images can be read; the first: {batch.bad[0]}")
    return batch


def _look_at_range(images: ShardImages, decoding: dict[str, Any]) -> list[str]:
    """Look at a few images before the first step; see `find_coarse_images`."""
    chosen = evenly(sum(images.counts), RANGE_IMAGES)
    return find_coarse_images(PackedReader(images, few=True), chosen, "data.shards", decoding)
