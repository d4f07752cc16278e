"""Measure a pretraining run on its held-out images: skill, collapse, pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpp.data.batch import Batch
from mpp.evaluation.rank import effective_rank, image_share
from mpp.objective.model import MaskedPatchModel
from mpp.objective.reconstruct import reconstruct
from mpp.parallel.team import Team
from mpp.pretraining.job import Pretraining
from mpp.pretraining.monitor import OnlineProbe, Probed, Spread, spread
from mpp.recipe.flat import JsonObject
from mpp.runs.log import RunLog
from mpp.runs.pictures import keep
from mpp.runs.symptoms import COLLAPSED_FEATURE_SHARE, COLLAPSED_TARGET_SHARE, Measured, collapsed, flat_since

RANK_IMAGES = 64
"""Number of held-out images for the rank of targets. Their cells are some thousands of rows."""
SPREAD_IMAGES = 256
"""Number of held-out images for the spread of features. Each image is one row."""
LEAST_SPREAD_IMAGES = 32
"""Least number of images for the spread of features. With fewer, the rank is low only for lack of images (a guess)."""
AT_ONCE = 256
"""Number of held-out images in one forward pass."""
LEAST_BITS = 1.0
"""Entropy of a target's classes below which a run warns (a guess; 512 colours of photographs carry 5 to 7)."""


@torch.no_grad()
def warn_of_poor_targets(model: MaskedPatchModel, raw: Tensor) -> list[str]:
    """Return a warning for each target whose classes hardly ever differ on these images.

    Args:
        model: The model with its targets.
        raw: (B, C, H, W) uint8 images.
    """
    lines = []
    for o in model.objectives:
        if o.target.of == "classes":
            share = torch.bincount(o.target(model.images(raw)).flatten()).float()
            share = share[share > 0] / share.sum()
            bits = float(-(share * share.log2()).sum()) + 0.0  # not -0.00
            if bits < LEAST_BITS:
                lines.append(
                    f"target {o.name}: its classes carry {bits:.2f} bits on the held-out images, "
                    f"below {LEAST_BITS}: there is little to predict. Are the images of one colour?"
                )
    return lines


@torch.no_grad()
def measure_collapse(model: MaskedPatchModel, raw: Tensor) -> dict[str, tuple[float, float]]:
    """Measure the targets that may collapse.

    Args:
        model: The model with its targets.
        raw: (B, C, H, W) uint8 images.

    Returns:
        (effective rank of the values, share of their energy that depends on the image) by name of the target. A target
        that is the same for every image has a share of 0, and its rank is that of its noise.
    """
    images = model.images(raw)
    values = {o.name: o.target(images) for o in model.objectives if o.target.may_collapse}
    return {name: (effective_rank(v.flatten(0, 1)), image_share(v)) for name, v in values.items()}


def probe_at_start(job: Pretraining) -> None:
    """Measure the probe before the first step of a run that starts from trained weights. All processes do the same."""
    if job.probe is None or not job.recipe.encoder.starts_trained or job.progress.step > 0:
        return
    job.watch.at(0, "probing")
    found = _probe(job, job.probe)
    job.progress.probe_at_start, job.progress.probe_fingerprint = found.accuracy, job.probe.fingerprint
    job.log.say(f"probe of the weights that training starts from: {found.accuracy:.1%}")


def _probe(job: Pretraining, probe: OnlineProbe) -> Probed:
    """Probe the encoder that the run would export now. All processes do the same."""
    with job.whole_encoder() as encoder:
        trains = encoder.training
        encoder.eval()
        found = probe(encoder, job.team.device)
        encoder.train(trains)
    return found


def measure(job: Pretraining, due: frozenset[str]) -> JsonObject:
    """Measure what is due after a step, on held-out images and in eval mode, and warn if something looks wrong.

    Args:
        job: The run. The results are stored in its progress.
        due: Names of what is due. "probe", "skill" and "pictures" are handled here.

    Returns:
        Values for the next line of metrics; empty if nothing was measured.
    """
    progress, team = job.progress, job.team
    if not due & {"probe", "skill", "pictures"}:
        return {}
    measured: JsonObject = {}
    if job.probe and "probe" in due:
        progress.probed = _probe(job, job.probe)
    if due & {"skill", "pictures"}:
        with job.whole.on_device(team.device) as model:
            if "skill" in due:
                progress.skills, progress.collapse, progress.features = measure_skills(team, model, job.held_out)
            if "pictures" in due and team.is_main:
                keep_pictures(team, model, job.held_out, job.recipe.reconstruct_images, job.log, progress.step)
    if "skill" in due:
        measured |= _skill_record(job)
        _warn(job, due)
    if "probe" in due and progress.probed:
        measured |= {f"probe_{key}": value for key, value in progress.probed._asdict().items()}
        if job.probe and progress.probe_at_start is not None:
            margin = job.probe.margin(progress.probe_at_start)
            measured |= {"probe_at_start": progress.probe_at_start, "probe_margin": margin}
            lost = progress.probe_at_start - progress.probed.accuracy
            if lost > margin:
                job.log.say(
                    f"warning: the probe is {100 * lost:.1f} points below that of the weights that training started "
                    "from. Try a lower optim.base_lr, fewer steps, or encoder.free_blocks"
                )
    return measured


def record_of(job: Pretraining, lr: float, measured: JsonObject) -> JsonObject:
    """Return a line of metrics.

    Args:
        job: The run.
        lr: Learning rate of the step.
        measured: Values of `measure`. Only the line of their step has them.
    """
    progress, names = job.progress, job.model.loss_names
    seen = progress.step * job.plan.global_batch_size
    record: JsonObject = {"step": progress.step, "seen": seen, "loss": progress.loss}
    if len(names) > 1:
        record |= {f"loss_{name}": value for name, value in zip(names, progress.losses, strict=True)}
    record |= measured
    record |= {"lr": lr, "grad_norm": progress.grad_norm, **job.pace.rates(job.plan.global_batch_size)}
    record[job.device_time.key] = progress.device_minutes
    record["skipped_images"] = progress.unreadable
    return record | ({"skipped_steps": progress.skipped} if progress.skipped else {})


def _skill_record(job: Pretraining) -> JsonObject:
    """Return skill, collapse of targets and spread of features by their keys in the metrics."""
    progress, objectives = job.progress, job.model.objectives
    record: JsonObject = {"skill": progress.skill}
    if len(objectives) > 1:
        record |= {f"skill_{o.name}": value for o, value in zip(objectives, progress.skills, strict=True)}
    record |= {f"target_rank_{name}": rank for name, (rank, _) in progress.collapse.items()}
    record |= {f"target_share_{name}": share for name, (_, share) in progress.collapse.items()}
    return record | ({f"feature_{k}": v for k, v in progress.features._asdict().items()} if progress.features else {})


def _warn(job: Pretraining, due: frozenset[str]) -> None:
    """Warn if features or targets collapse, and if neither skill nor probe accuracy rises any more."""
    progress, log, features = job.progress, job.log, job.progress.features
    if features and collapsed(*features, COLLAPSED_FEATURE_SHARE):
        log.say(
            f"warning: the encoder's features collapse: {features.share:.2%} of them depends on the image, "
            f"effective rank {features.rank:.1f}. Try a lower optim.base_lr, or more warm-up"
        )
    for name, (rank, share) in progress.collapse.items():
        if collapsed(rank, share, COLLAPSED_TARGET_SHARE):
            log.say(
                f"warning: target {name} collapses: {share:.1%} of it depends on the image, effective rank "
                f"{rank:.1f}. Try a higher decay, a lower optim.base_lr, or more warm-up"
            )
    known = flat_since(progress.history)
    if math.isfinite(progress.skill):
        accuracy = progress.probed.accuracy if progress.probed else None
        progress.history.append(Measured(progress.step, progress.skill, accuracy))
    since = flat_since(progress.history)
    if since is not None and known is None and "end" not in due:
        log.say(f"warning: neither skill nor probe has risen since step {since}; see metrics.jsonl")


def measure_skills(
    team: Team, model: MaskedPatchModel, held_out: Batch
) -> tuple[list[float], dict[str, tuple[float, float]], Spread | None]:
    """Measure a model on held-out images, in eval mode. Every process does the same, so that none waits for another.

    Returns:
        (skill of each objective, rank and share of each target that may collapse, spread of the features). The spread
        is None if there are fewer than LEAST_SPREAD_IMAGES images.
    """
    model.eval()
    model_loss = trivial = torch.zeros(len(model.objectives), dtype=torch.float64)
    with team.autocast():
        for i in range(0, len(held_out.images), AT_ONCE):
            part = slice(i, i + AT_ONCE)
            images = held_out.images[part].to(team.device)
            units = held_out.units.of(part).tensors_by(lambda t: t.to(team.device))
            a, b = model.losses_for_skill(images, units)
            model_loss, trivial = model_loss + a.cpu() * len(images), trivial + b.cpu() * len(images)
        collapse = measure_collapse(model, held_out.images[:RANK_IMAGES].to(team.device))
        shown = model.images(held_out.images[:SPREAD_IMAGES].to(team.device)).normalised
        features = spread(model.encoder.model, shown) if len(shown) >= LEAST_SPREAD_IMAGES else None
    model.train()
    skills = [1 - o / t if t > 0 else math.nan for o, t in zip(model_loss.tolist(), trivial.tolist(), strict=True)]
    return skills, collapse, features


def keep_pictures(team: Team, model: MaskedPatchModel, held_out: Batch, count: int, log: RunLog, step: int) -> None:
    """Store pictures of the first held-out images, drawn in eval mode, if a target has a picture.

    A full disk does not end the run here. The log gets a warning.
    """
    if count == 0:
        return
    model.eval()
    first = slice(count)
    units = held_out.units.of(first).tensors_by(lambda t: t.to(team.device))
    with team.autocast():
        reconstructions = reconstruct(model, held_out.images[first].to(team.device), units)
    model.train()
    try:
        keep(log.out, step, reconstructions)
    except OSError as error:
        log.say(f"warning: the pictures of step {step} are not kept: {error.strerror or error}")
