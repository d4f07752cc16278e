"""Find what is wrong with a run from its records, with advice for each symptom. A healthy run has no symptoms.

The thresholds are guesses. They were checked on healthy runs and on runs that were broken on purpose
(tests/runs/test_symptoms.py, recipes/LOG.md).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from mpp.errors import one_line
from mpp.recipe.flat import JsonMapping
from mpp.runs.history import History, approaches_of_finetune
from mpp.runs.verdict import APPROACHES, compare_approaches, conclude, stored_estimate

FLAT = 0.98
"""The loss is flat if the median of its last quarter is above this multiple of the median of its second eighth."""
LEAST_RECORDS = 8
"""Least number of measurements before a curve is judged."""
DIVERGED_LOSS = 1.25
"""A run diverged if the last running median of its losses exceeds this multiple of the lowest, and its skill fell.

A running median covers an eighth of the losses, and at least five. A run with fewer than two skills is judged by its
losses only."""
DIVERGED_SKILL = 0.1
"""A run also diverged if its skill fell this far below its best, whatever its loss."""
DATA_BOUND = 0.25
"""Fraction of the time spent waiting for batches above which the loader is the bottleneck."""
SLOWER = 0.4
"""A run slowed down if its last running median of images per second is below this fraction of its best.

A running median covers an eighth of the lines, and at least five."""
LEAST_SLOW_S = 60
"""Least time in seconds that the slow stretch covers, so that a short load from other work does not count."""
BAD_FRACTION, LEAST_BAD = 1e-4, 10
"""Fraction and number of unreadable images; there is a warning if both are reached.

Both are far below what stops a run (`max_bad_fraction`)."""

UNDERFIT = 0.75
"""A fine-tune is underfit if its training loss ends above this fraction of the loss of a uniform guess (guess).

Mixup and label smoothing by themselves leave the loss at half of that of a uniform guess."""

COLLAPSED_RANK = 2.0
"""If the effective rank of a target or of the features is below this, there is a warning.

At most two directions are left then (guess). Features of 18 encoders that fine-tune had 5 to 57."""
COLLAPSED_TARGET_SHARE = 0.1
"""If a smaller share of a target's energy depends on the image, there is a warning (guess; at first it is a half)."""
COLLAPSED_FEATURE_SHARE = 0.002
"""The same threshold for features (guess). The part that all images share is harmless there and may be large.

Features of the same 18 encoders had 0.018 to 0.80."""
RECENT = 4
"""A run is flat if this number of latest measurements contains no new best (guess)."""
RISE = 0.003
"""Rise in skill or accuracy that counts as a new best (guess)."""
DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""Exceptions that damaged records, whose content has an unexpected shape, raise in code that reads them."""


@dataclass(frozen=True)
class Symptom:
    """One thing that deserves a second look."""

    kind: str
    """failed, diverged, flat, below_trivial, worse, collapse, data_bound, slower, bad_images, leak, no_gain, control,
    dead, damaged, better_approach, underfit"""
    text: str
    """The finding, as a sentence."""
    advice: str
    """What to try about it."""


def collapsed(rank: float, share: float, least_share: float) -> bool:
    """Return whether a target, or the features, hardly depend on the image.

    Args:
        rank: Effective rank; nan is ignored.
        share: Share of the energy that depends on the image; nan is ignored.
        least_share: Least share of a target or features that have not collapsed.
    """
    return rank < COLLAPSED_RANK or share < least_share


class Measured(NamedTuple):
    """Skill and probe accuracy of a run at one step."""

    step: int
    skill: float
    probe: float | None


def flat_since(history: Sequence[Measured]) -> int | None:
    """Return the step of the best measurement before the last `RECENT`, or None if skill or probe rose in these."""
    if len(history) <= RECENT:
        return None
    before, recent = history[:-RECENT], history[-RECENT:]
    if max(m.skill for m in recent) > max(m.skill for m in before) + RISE:
        return None
    old, new = ([m.probe for m in part if m.probe is not None] for part in (before, recent))
    if new and (not old or max(new) > max(old) + RISE):
        return None
    return max(before, key=lambda m: m.skill).step


CONTINUE = "To continue from the last checkpoint, repeat the command with --resume auto."


def symptoms(run: History) -> list[Symptom]:
    """Return the symptoms of a run of any job, those of its process first; [] if nothing is wrong."""
    rules = {"pretrain": _of_pretraining, "finetune": _of_finetuning, "evaluate": _of_evaluation}
    listed = _of_process(run)
    try:
        listed += rules[run.job](run)
    except DAMAGED as error:
        text = f"Its records cannot all be read ({type(error).__name__}: {one_line(error)})."
        listed.append(Symptom("damaged", text, "See result.json and data.json."))
    return listed


def _of_process(run: History) -> list[Symptom]:
    """Return the symptoms of the trials' processes, else those of the run's, which may also end between two trials."""
    of_trials = [symptom for trial in run.trials for symptom in _of_status(trial, f"{trial.name}: ")]
    return of_trials or _of_status(run, "")


def _of_status(part: History, where: str) -> list[Symptom]:
    listed = []
    if part.status.get("state") == "failed":
        why = str(part.status.get("why", "see train.log")).removeprefix(f"step {part.status.get('step')}: ")
        at = f" at step {part.status['step']:,}" if "step" in part.status else ""
        if "max_bad_fraction" in why:
            advice = "train.log names the images."
        elif "gradient norm" in why:
            advice = "A lower optim.base_lr, more warm-up, optim.clip_grad_norm: 1, or precision: fp32."
        else:
            advice = CONTINUE
        listed.append(Symptom("failed", f"{where}It ended{at}: {why}.", advice))
    if part.alive() is False:
        gone = f"{where}status.json says running, but process {part.status.get('pid')} is gone."
        listed.append(Symptom("dead", gone, CONTINUE))
    return listed


def _of_pretraining(run: History) -> list[Symptom]:
    listed = []
    moving = any(key.startswith("target_share_") for key in run.latest)
    diverged = _diverged(run, moving)
    if diverged:
        listed.append(diverged)
    elif flat := _flat(run, moving):
        listed.append(flat)
    skill = run.last("skill")
    early = run.status.get("state") == "running" and len(_measured(run)) < 2  # still warming up
    if skill is not None and skill <= 0 and not moving and not early:
        listed.append(
            Symptom(
                "below_trivial",
                f"The skill is {skill:.3f}: a guess without the image is as good.",
                "Train longer, try another optim.base_lr, or hide less (mask.ratio).",
            )
        )
    if worse := _worse_than_at_start(run):
        listed.append(worse)
    listed += _collapsed(run)
    if (wait := _data_wait(run)) is not None and wait > DATA_BOUND:
        listed.append(
            Symptom(
                "data_bound",
                f"{wait:.0%} of the time went by waiting for images: the loader is the bottleneck.",
                "More data.workers, smaller images in the shards, or shards on a faster disk.",
            )
        )
    if slower := _slower(run):
        listed.append(slower)
    bad, seen = run.last("skipped_images"), run.images_seen()
    if bad and seen and bad >= LEAST_BAD and bad > BAD_FRACTION * seen:
        listed.append(
            Symptom(
                "bad_images",
                f"{bad:,.0f} of {seen:,.0f} images could not be read ({bad / seen:.2%}); neighbours took their place.",
                "train.log names them; `mpp index` checks the shards.",
            )
        )
    return listed


def _medians(values: Sequence[float], width: int) -> list[float]:
    return [statistics.median(values[i : i + width]) for i in range(len(values) - width + 1)]


def _diverged(run: History, moving: bool) -> Symptom | None:
    losses = run.series("loss")[1]
    skills = [] if moving else run.series("skill")[1]
    text = ""
    if len(losses) >= LEAST_RECORDS and not moving:
        smooth = _medians(losses, max(5, len(losses) // 8))
        fallen = len(skills) < 2 or skills[-1] < max(skills) - RISE  # the skill is less noisy: it is of held-out images
        if fallen and smooth[-1] > DIVERGED_LOSS * min(smooth) > 0:
            text = f"The loss rose again, from {min(smooth):.3g} to {smooth[-1]:.3g}"
    if skills and skills[-1] < max(skills) - DIVERGED_SKILL:
        text = text or f"The skill fell again, from {max(skills):.3f} to {skills[-1]:.3f}"
    if not text:
        return None
    return Symptom("diverged", f"{text}: training diverged.", "A lower optim.base_lr, more warm-up, or clip_grad_norm.")


def _flat(run: History, moving: bool) -> Symptom | None:
    steps, losses = run.series("loss")
    total = run.status.get("steps") or (steps[-1] if steps else 0)
    advice = "Another optim.base_lr; a probe (key `probe`) tells whether features still get better."
    history = _measured(run)
    if moving:  # if the target itself is learned, it gets richer and the skill need not rise
        history = [m._replace(skill=0.0) for m in history if m.probe is not None]
    risen = len(history) > 1 and max(m.skill for m in history) > history[0].skill + RISE
    if len(losses) >= LEAST_RECORDS and not moving and not risen and steps[-1] >= total / 2:
        n = len(losses)
        early, late = statistics.median(losses[n // 8 : n // 4 + 1]), statistics.median(losses[-(n // 4) :])
        if late > FLAT * early:
            return Symptom("flat", f"The loss hardly falls: {early:.4g} early on, {late:.4g} at last.", advice)
    since = flat_since(history)
    if since is not None and since < total / 2:
        probed = any(m.probe is not None for m in history)
        what = "The probe has not" if moving else "Neither skill nor probe has" if probed else "The skill has not"
        return Symptom("flat", f"{what} risen since step {since:,} of {total:,}.", advice)
    return None


def _measured(run: History) -> list[Measured]:
    """Return each measurement of the skill, with the newest probe accuracy since the measurement before it."""
    measured: list[Measured] = []
    probe = None
    for m in run.metrics:
        probe = m.get("probe_accuracy", probe)
        if m.get("skill") is not None:
            measured.append(Measured(m["step"], m["skill"], probe))
            probe = None
    return measured


def _worse_than_at_start(run: History) -> Symptom | None:
    at_start, now = run.last("probe_at_start"), run.last("probe_accuracy")
    if at_start is None or now is None or now >= at_start - (run.last("probe_margin") or 0.0):
        return None
    return Symptom(
        "worse",
        f"The encoder gets worse: the probe is at {now:.1%}, and was at {at_start:.1%} before the first step.",
        "A lower optim.base_lr, fewer steps, or encoder.free_blocks, which trains the last blocks only.",
    )


def _collapsed(run: History) -> list[Symptom]:
    listed = []
    names = [key.removeprefix("target_share_") for key in run.latest if key.startswith("target_share_")]
    for name, key, least in [
        *((f"target {n}", f"target_{{}}_{n}", COLLAPSED_TARGET_SHARE) for n in names),
        ("the encoder's features", "feature_{}", COLLAPSED_FEATURE_SHARE),
    ]:
        rank, share = run.last(key.format("rank")), run.last(key.format("share"))
        if rank is None or share is None or not collapsed(rank, share, least):
            continue
        listed.append(
            Symptom(
                "collapse",
                f"Collapse of {name}: effective rank {rank:.1f}, and {share:.2%} of it depends on the image.",
                "A higher decay of the teacher, a lower optim.base_lr, more warm-up, or a target of pixels.",
            )
        )
    return listed


def _slower(run: History) -> Symptom | None:
    lines = [m for m in run.metrics if m.get("images_per_s") and m.get("seen")]
    if len(lines) < LEAST_RECORDS:
        return None
    width = max(5, len(lines) // 8)
    smooth = _medians([m["images_per_s"] for m in lines], width)
    lately_s = sum((b["seen"] - a["seen"]) / b["images_per_s"] for a, b in pairwise(lines[-width - 1 :]))
    if smooth[-1] >= SLOWER * max(smooth) or lately_s < LEAST_SLOW_S:
        return None
    return Symptom(
        "slower",
        f"It slowed down, from {max(smooth):,.0f} to {smooth[-1]:,.0f} images a second.",
        "Is other work running on this machine? Fewer data.workers leave it more room; continue with --resume auto.",
    )


def _data_wait(run: History) -> float | None:
    """Return the fraction of the time spent waiting: the median over all lines but the first.

    The first line is left out because the loader starts in it.
    """
    shares = run.series("data_wait")[1][1:]
    return statistics.median(shares) if shares else None


def _of_finetuning(run: History) -> list[Symptom]:
    listed = []
    for key, where in (("val_in_train", "data.train"), ("val_in_pretraining", "the pretraining images")):
        leaked = run.data.get(key) or {}
        if leaked.get("shared"):
            name = (leaked.get("examples") or [["?"]])[0][0]
            text = (
                f"{leaked['shared']} of {leaked['checked']} validation images are among {where}, byte by byte: {name} …"
            )
            listed.append(
                Symptom("leak", text, "Split again so that no image is on both sides; the figures are too high.")
            )
    for verdict in run.result.get("verdicts", []):
        if not verdict.get("gain"):
            continue
        gain = stored_estimate(verdict["gain"])
        concluded = conclude(gain)
        if concluded.kind in ("hurt", "not_shown"):
            labels = f"At {verdict['labels_per_class']} labels a class " if verdict.get("labels_per_class") else ""
            gain_text = f"{labels}{concluded.text} ({100 * gain.mean:+.1f} ± {100 * gain.half_width:.1f} points)."
            advice = "Pretrain longer, on more images of the same kind; more seeds make the interval narrower."
            listed.append(Symptom("no_gain", gain_text[0].upper() + gain_text[1:], advice))
    listed += [symptom for v in run.result.get("verdicts", []) if (symptom := _better_approach(v))]
    first_approach = approaches_of_finetune(run.recipe)[0]
    for trial in run.trials:
        text = underfit(trial.name, trial.metrics, run.recipe, run.data.get("classes", 0)) if trial.result else ""
        if text and f"{first_approach}-seed" in trial.name:
            listed.append(Symptom("underfit", text, UNDERFIT_ADVICE))
            break  # the other seeds trained for as long
    return listed


UNDERFIT_ADVICE = "Train longer (optim.epochs, optim.steps), or with a higher optim.base_lr."


def underfit(trial: str, metrics: Sequence[JsonMapping], recipe: JsonMapping, classes: int) -> str:
    """Return a sentence about a trial whose training loss ended near that of a guess; "" for any other trial.

    Only classification is judged, without unlabeled images and without distillation.

    Args:
        trial: Name of the trial.
        metrics: Records of its metrics.jsonl.
        recipe: Recipe of the run.
        classes: Number of classes.
    """
    if (recipe.get("task") or {}).get("name", "classify") != "classify" or classes < 2:
        return ""
    if recipe.get("unlabeled") or recipe.get("distill"):
        return ""
    losses = [m["loss"] for m in metrics if isinstance(m.get("loss"), float) and math.isfinite(m["loss"])]
    if len(losses) < LEAST_RECORDS:
        return ""
    last, guess = statistics.median(losses[-len(losses) // 4 :]), math.log(classes)
    if last < UNDERFIT * guess:
        return ""
    ended = f"{trial} is underfit: its training loss ended at {last:.2f}"
    return f"{ended}, and a mere guess among {classes} classes has {guess:.2f}."


def _better_approach(verdict: JsonMapping) -> Symptom | None:
    """Return a symptom if an approach other than the pretrained encoder is best by more than chance."""
    score = {approach: stored_estimate(value) for approach, value in verdict.get("score", {}).items()}
    compared = compare_approaches(score) if "pretrained" in score else None
    if compared is None or compared.kind != "best":
        return None
    best = max(score, key=lambda approach: score[approach].mean)
    if best == "pretrained":
        return None
    text = f"{compared.text[0].upper()}{compared.text[1:]}."
    return Symptom(
        "better_approach",
        text,
        f"Take that one, or pretrain longer: {APPROACHES[best]} is in the folders {best}-seed*.",
    )


def _of_evaluation(run: History) -> list[Symptom]:
    listed = []
    best = run.result.get("best", {})
    for probe, score in best.get("encoder", {}).items():
        for control, what in (("random", "the same architecture at random initialisation"), ("pixels", "raw pixels")):
            found = best.get(control, {}).get(probe)
            if found and score["accuracy"] <= found["accuracy"]:
                text = f"The {probe} probe reads {100 * score['accuracy']:.1f} %, no more than of {what}, "
                text += f"{100 * found['accuracy']:.1f} %."
                listed.append(
                    Symptom("control", text, "Probes are poor at short schedules; fine-tuning is the better judge.")
                )
    return listed
