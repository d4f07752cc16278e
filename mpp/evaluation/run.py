"""Evaluate the features of a frozen encoder with three probes over layers and poolings, and compare with controls.

Nothing is chosen by the validation images. k, weight decay, learning rate and the best layer are chosen on a part of
the training images. The probe is then fitted to all training images and judged once.
"""

from __future__ import annotations

import signal
import time
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from mpp.data.labeled import open_labeled
from mpp.data.subsets import split
from mpp.data.unreadable import check_images
from mpp.drawing.plots import Level, Line, draw
from mpp.encoders.resolve import resolve
from mpp.encoders.sources import check_source, fingerprint_of_inputs
from mpp.errors import MppWarning, UserError, one_line
from mpp.evaluation.arm import Arm, Data, finished_arm, open_reader, run_arm
from mpp.evaluation.features import PixelReader
from mpp.evaluation.result import PLOT, RESULT, EvaluateResult
from mpp.parallel.signals import ending_on_signals
from mpp.parallel.team import Team, start_team
from mpp.recipe.evaluate import EvaluateRecipe
from mpp.recipe.flat import JsonObject
from mpp.runs.environment import environment
from mpp.runs.folder import opened
from mpp.runs.log import format_duration
from mpp.runs.records import write_json, write_status


def evaluate(recipe: EvaluateRecipe, resume: str = "never") -> EvaluateResult:
    """Run an evaluation.

    Args:
        recipe: Recipe of the evaluation.
        resume: "never" (the run folder must be new), "auto" (results of finished encoders and controls are kept), or
            "overwrite" (they are deleted first).

    Returns:
        The scores of all encoders and controls.

    Raises:
        UserError: If anything is wrong that the user can correct.
    """
    recipe = resolve(recipe, recipe.encoder, warn=True, normalise=False)
    if resume not in ("never", "auto", "overwrite"):
        raise UserError(f"--resume {resume}: expected auto or never; an evaluation has no checkpoints")
    team = start_team(recipe.precision, device=recipe.device)
    if team.world > 1:
        raise UserError(f"evaluate runs in one process; got {team.world}")
    data = _open(recipe)
    for key, source in (("encoder", recipe.encoder), ("compare", recipe.compare)):
        if source:
            check_source(source, key=key)
    readers = {
        arm: None if arm == "pixels" else open_reader(recipe, arm) for arm in _arms(recipe)
    }  # errors come before any work
    sizes = {arm: reader.size for arm, reader in readers.items() if reader is not None}
    fingerprint = _fingerprint(recipe, data)
    with opened(team, recipe, resume, fingerprint=fingerprint), ending_on_signals():
        try:
            return _evaluate(recipe, team, data, readers, sizes, fingerprint)
        except (KeyboardInterrupt, SystemExit) as end:
            number = end.code - 128 if isinstance(end, SystemExit) and isinstance(end.code, int) else signal.SIGINT
            with suppress(OSError):
                write_status(Path(recipe.out), "stopped", why=signal.Signals(number).name)
            print("stopped; --resume auto keeps what is finished", flush=True)
            raise
        except BaseException as error:
            with suppress(OSError):  # the disk is most likely full
                write_status(Path(recipe.out), "failed", why=one_line(error) or type(error).__name__)
            raise


def _evaluate(
    recipe: EvaluateRecipe,
    team: Team,
    data: Data,
    readers: JsonObject,
    sizes: JsonObject,
    fingerprint: str,
) -> EvaluateResult:
    out = Path(recipe.out)
    write_json(out / "env.json", environment())
    write_status(out, "running")
    arms: dict[str, Arm] = {}
    took_s: list[float] = []
    for number, (arm, arm_reader) in enumerate(readers.items()):
        folder = out / "arms" / arm
        done = finished_arm(folder, fingerprint)
        if done is None:
            began, left = time.monotonic(), len(readers) - number
            pace = f", about {format_duration(sum(took_s) / len(took_s) * left)} left" if took_s else ""
            print(f"part {number + 1} of {len(readers)}: {arm}{pace}", flush=True)
            write_status(out, "running", arm=arm, number=number + 1, of=len(readers))
            size = arm_reader.size if arm_reader else sizes["encoder"]
            reader = arm_reader.reader if arm_reader else PixelReader()
            done = run_arm(recipe, team, reader.to(team.device), data, size, folder)
            reader.cpu()
            write_json(folder / RESULT, {"fingerprint": fingerprint, **asdict(done)})
            took_s.append(time.monotonic() - began)
        arms[arm] = done

    encoder_arm = arms["encoder"]
    lost = [name for name, judged in zip(data.val.classes, encoder_arm.judged, strict=True) if not judged]
    lost = sorted(set(lost) & {data.val.classes[label] for label in data.val.labels})
    if encoder_arm.unreadable:
        of_classes = f"; not one of {', '.join(lost)} in data.val" if lost else ""
        unreadable = encoder_arm.unreadable
        what = f"{len(unreadable)} images could not be read and are left out, such as {unreadable[0]}"
        warnings.warn(f"{what}{of_classes}", MppWarning, stacklevel=3)
    scores = {name: arm.scores for name, arm in arms.items()}
    result = EvaluateResult(out, scores, max(encoder_arm.judged) / sum(encoder_arm.judged), out / PLOT, len(data.tune))
    _plot(result)
    best = {
        arm: {probe: asdict(s) for probe in recipe.probes if (s := result.best(arm, probe))} for arm in result.scores
    }
    write_json(
        out / RESULT,
        {
            "best": best,
            "chance": result.chance,
            "chosen_by": result.chosen_by,
            "train_images": len(data.fit) + len(data.tune),
            "val_images": len(data.val.labels),
            "val_images_read": sum(encoder_arm.judged),
            "unreadable": encoder_arm.unreadable,
            "unread_classes": lost,
            "scores": {name: [asdict(s) for s in of_arm] for name, of_arm in scores.items()},
        },
    )
    write_status(out, "finished")
    return result


def _arms(recipe: EvaluateRecipe) -> list[str]:
    return ["encoder", *(["compare"] if recipe.compare else []), *(["random", "pixels"] if recipe.controls else [])]


def _open(recipe: EvaluateRecipe) -> Data:
    keys = recipe.data
    train = open_labeled(keys.train, key="data.train", classes=None, **keys.opening())
    val = open_labeled(keys.val, key="data.val", classes=train.classes, **keys.opening())
    if len(val.labels) == 0:
        raise UserError(f"data.val: no images in {', '.join(keys.val)}")
    if len(train.classes) < 2:
        raise UserError(f"data.train: only one class ({train.classes[0]}); at least two are needed")
    if train.fingerprint() == val.fingerprint():
        raise UserError("data.val: the same images as data.train; the accuracy would be meaningless")
    chosen = train.subset(labels_per_class=keys.labels_per_class, fraction=keys.fraction, seed=recipe.seed)
    fit, tune = split(train.strata[chosen], recipe.tune_fraction, recipe.seed)
    if len(tune) == 0:
        raise UserError("data.train: at least one class needs two or more images, to tune the probes on")
    for key, images in (("data.train", train), ("data.val", val)):
        for doubt in check_images(images, key, keys.decoding(), keys.max_bad_fraction):
            warnings.warn(doubt, MppWarning, stacklevel=4)
    return Data(train, val, chosen[fit], chosen[tune])


def _fingerprint(recipe: EvaluateRecipe, data: Data) -> str:
    """Return a fingerprint of the data and of the weights of the encoders."""
    return fingerprint_of_inputs(data.train.fingerprint(), data.val.fingerprint(), recipe.encoder, recipe.compare)


def _plot(result: EvaluateResult) -> None:
    panels: dict[str, list[Line | Level]] = {}
    for arm, scores in result.scores.items():
        for probe in dict.fromkeys(s.probe for s in scores):
            panel = panels.setdefault(probe, [])
            for pool in dict.fromkeys(s.pool for s in scores if s.probe == probe):
                of_pool = [s for s in scores if s.probe == probe and s.pool == pool]
                if pool == "own":
                    panel += [Level(f"{arm}, {s.layer}" if arm != s.layer else arm, 100 * s.accuracy) for s in of_pool]
                else:
                    name = f"{arm}, {pool}"
                    x, y = [float(s.layer) for s in of_pool], [100 * s.accuracy for s in of_pool]
                    panel.append(Line(name, x, y, dashed=arm == "random"))
    draw(panels, result.plot, xlabel="layer", ylabel="accuracy, %")
