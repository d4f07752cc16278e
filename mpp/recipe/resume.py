"""Check which keys have changed when a run is resumed."""

from __future__ import annotations

import os
from typing import Any

from mpp.recipe.dump import settings_of
from mpp.recipe.flat import differing
from mpp.recipe.sections import Job

MAY_CHANGE = {
    "out", "device", "devices", "beside", "log_every_steps", "checkpoint_every_steps", "keep_checkpoints",
    "data.workers", "data.cache_dir", "data.cache_limit_gb", "seeds", "data.batch_size", "keep_features",
    "data.max_bad_fraction", "optim.max_batch_per_device", "encoder.grad_checkpointing", "reconstruct_images",
    "trackers", "if_unsaved", "hang_timeout_s", "max_skipped_steps", "compile", "fsdp",
    # places of images; a fingerprint detects if the images themselves have changed
    "data.shards", "data.train", "data.val", "unlabeled.images", "distill.images",
}  # fmt: skip
"""Keys that a resumed run may change, because they do not change what is computed. Exceptions are rounding, and what
depends on micro-batches: draws of drop path, mixup and random erasing, statistics of batch norms, agreement, and
clusters."""


LENGTH = ("optim.steps", "optim.epochs")
"""Keys that set the length of a training. A recipe has one of them."""


def differences(old: Job, new: Job) -> list[str]:
    """Return a line for each key that differs and may not change when a run is resumed.

    Secrets are left out of the comparison, so a URL may have a new signature.
    """
    a, b = (settings_of(r) for r in (old, new))
    longer = asks_for_longer(old, new)
    hint = _why_not_longer(a) if _grows(old, new) else ""
    free = {"probe"} | ({"cnn"} if "cnn" not in a.get("beside", ()) else set())  # the run has not trained a cnn yet
    return [
        f"{key}: was {a.get(key, '(absent)')!r}, now {b.get(key, '(absent)')!r}{hint if key in LENGTH else ''}"
        for key in differing([a, b])
        if key not in MAY_CHANGE
        and key.split(".")[0] not in free
        and not (longer and key in LENGTH)
        and not _is_harmless(key, a.get(key), b.get(key))
    ]


def asks_for_longer(old: Job, new: Job) -> bool:
    """Return whether `new` makes the pretraining of `old` longer, with a learning rate that allows it."""
    return _grows(old, new) and not _why_not_longer(settings_of(old))


def _grows(old: Job, new: Job) -> bool:
    """Return whether `new` is the longer run, by the same key as `old`."""
    lengths = list(zip(length_of(old), length_of(new), strict=True))
    grown = [a is not None and b is not None and a < b for a, b in lengths]
    return any(grown) and all(grows or a == b for grows, (a, b) in zip(grown, lengths, strict=True))


def _why_not_longer(settings: dict[str, Any]) -> str:
    """Return why a run with these settings cannot be made longer, in brackets; "" if it can."""
    if settings["job"] != "pretrain":
        return " (only a pretraining can be made longer)"
    if settings["optim.schedule"] not in ("wsd", "constant"):
        return " (a pretraining that is to be made longer needs optim.schedule: wsd or constant from the start)"
    targets = [(settings.get("target.decay"), settings.get("target.decay_end"))]
    for extra in settings.get("extra_targets", ()):
        targets.append((extra["target"].get("decay"), extra["target"].get("decay_end")))
    if any(decay != decay_end for decay, decay_end in targets):
        return " (a moving teacher whose decay rises depends on the length; give decay_end the value of decay)"
    return ""


def length_of(recipe: Job) -> list[float | None]:
    """Return the values of `LENGTH` in a recipe. A job without these keys has None for each."""
    settings = settings_of(recipe)
    return [settings.get(key) for key in LENGTH]


def _is_harmless(key: str, before: Any, now: Any) -> bool:
    """Return whether this change of a key is allowed although the key may not change in general.

    Two changes are allowed. More image formats do not affect the images that were read before. An encoder may be in
    another folder, because its weights are part of the fingerprint.
    """
    if key == "data.formats":
        return set(before or ()) <= set(now or ())
    return key in ("encoder", "compare") and isinstance(now, str) and os.path.isdir(now)
