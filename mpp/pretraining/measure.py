"""Measure a pretraining run on its held-out images: skill, collapse, pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpp.data.batch import Batch
from mpp.evaluation.rank import effective_rank, image_share
from mpp.objective.model import MaskedPatchModel
from mpp.objective.reconstruct import reconstruct
from mpp.parallel.team import Accelerator
from mpp.pretraining.monitor import Spread, spread
from mpp.runs.log import RunLog
from mpp.runs.pictures import keep

RANK_IMAGES = 64
"""Held-out images whose targets the rank is taken from; their cells are some thousands of rows."""
SPREAD_IMAGES = 256
"""Held-out images whose features the spread is taken from: one row each."""
LEAST_SPREAD_IMAGES = 32
"""With fewer images the rank of the features is low because the images are few (a guess)."""
LEAST_BITS = 1.0
"""Entropy of a target's classes below which a run warns (a guess; 512 colours of photographs carry 5 to 7)."""


@torch.no_grad()
def warn_of_poor_targets(model: MaskedPatchModel, raw: Tensor) -> list[str]:
    """Return a line for each target whose classes hardly ever differ on these images, (B, C, H, W) uint8."""
    found = []
    for o in model.objectives:
        if o.target.of == "classes":
            share = torch.bincount(o.target(model.images(raw)).flatten()).float()
            share = share[share > 0] / share.sum()
            bits = float(-(share * share.log2()).sum()) + 0.0  # not -0.00
            if bits < LEAST_BITS:
                found.append(
                    f"target {o.name}: its classes carry {bits:.2f} bits on the held-out images, "
                    f"below {LEAST_BITS}: there is little to predict. Are the images of one colour?"
                )
    return found


@torch.no_grad()
def measure_collapse(model: MaskedPatchModel, raw: Tensor) -> dict[str, tuple[float, float]]:
    """Measure the targets that may collapse.

    Args:
        raw: (B, C, H, W) uint8 images.

    Returns:
        By name of the target: effective rank of its values, and the share of them that depends on the image. A target
        that is the same for every image has a share of 0; its rank is that of the noise on it.
    """
    images = model.images(raw)
    values = {o.name: o.target(images) for o in model.objectives if o.target.may_collapse}
    return {name: (effective_rank(v.flatten(0, 1)), image_share(v)) for name, v in values.items()}


def measure_skills(
    accelerator: Accelerator, model: MaskedPatchModel, held_out: Batch
) -> tuple[list[float], dict[str, tuple[float, float]], Spread | None]:
    """(skill of each objective, rank and share of targets that may collapse, those of the features), in eval mode.

    On every process alike, so that none waits for another.
    """
    model.eval()
    own = trivial = torch.zeros(len(model.objectives), dtype=torch.float64)
    with accelerator.autocast():
        for i in range(0, len(held_out.images), 256):
            images, mask, noise = (
                t[i : i + 256].to(accelerator.device) for t in (held_out.images, held_out.mask, held_out.noise)
            )
            a, b = model.losses_for_skill(images, mask, noise, held_out.hidden_units)
            own, trivial = own + a.cpu() * len(images), trivial + b.cpu() * len(images)
        collapse = measure_collapse(model, held_out.images[:RANK_IMAGES].to(accelerator.device))
        shown = model.images(held_out.images[:SPREAD_IMAGES].to(accelerator.device)).normalised
        features = spread(model.encoder.model, shown) if len(shown) >= LEAST_SPREAD_IMAGES else None
    model.train()
    skills = [1 - o / t if t > 0 else math.nan for o, t in zip(own.tolist(), trivial.tolist(), strict=True)]
    return skills, collapse, features


def keep_pictures(
    accelerator: Accelerator, model: MaskedPatchModel, held_out: Batch, count: int, log: RunLog, step: int
) -> None:
    """Keep pictures of the first held-out images, in eval mode; nothing where no target has any.

    A disk that is full is no reason to end a run here: it is said.
    """
    if count == 0:
        return
    model.eval()
    images, mask, noise = (t[:count].to(accelerator.device) for t in (held_out.images, held_out.mask, held_out.noise))
    with accelerator.autocast():
        found = reconstruct(model, images, mask, noise, held_out.hidden_units)
    model.train()
    try:
        keep(log.out, step, found)
    except OSError as error:
        log.say(f"warning: the pictures of step {step} are not kept: {error.strerror or error}")
