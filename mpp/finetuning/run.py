"""Fine-tune on labeled images and compare with baselines: the trials of a run, and its verdict."""

from __future__ import annotations

import json
import os
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mpp.data.leak import Leak, leak
from mpp.data.readers import LabeledImages, PackedReader
from mpp.data.shards.reader import ShardImages
from mpp.data.shards.remote import is_remote
from mpp.data.unreadable import check_images
from mpp.drawing.plots import draw
from mpp.encoders.resolve import resolve
from mpp.encoders.sources import check_source, fingerprint_of_inputs
from mpp.errors import MppWarning, UserError
from mpp.finetuning.approaches import approaches_of
from mpp.finetuning.checks import check_run, doubt_teacher
from mpp.finetuning.job import Run
from mpp.finetuning.loop import train
from mpp.finetuning.minutes_before import minutes_before
from mpp.finetuning.open_labels import open_label_kind
from mpp.finetuning.setup import prepare_trial
from mpp.finetuning.trial import RESULT, Trial, TrialResult, read_result, read_unread_classes, trials_of
from mpp.finetuning.unlabeled import open_unlabeled
from mpp.parallel.devices import advise_on_cpu
from mpp.parallel.launch import check_devices
from mpp.parallel.liveness import Watch
from mpp.parallel.signals import StopRequest
from mpp.parallel.team import start_team
from mpp.recipe import registry
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import load_recipe
from mpp.recipe.pretrain import PretrainRecipe
from mpp.runs.environment import environment
from mpp.runs.folder import DATA, opened
from mpp.runs.log import format_duration
from mpp.runs.records import read_metrics, write_json, write_status
from mpp.runs.symptoms import UNDERFIT_ADVICE, underfit
from mpp.runs.verdict import Cost, Estimate, Verdict, line_of_scores, name_unread, table
from mpp.training.device_time import unit_of

PLOT = "label_efficiency.png"


@dataclass(frozen=True)
class FinetuneResult:
    """The result of `finetune`."""

    out: Path
    state: str
    """"finished", or "stopped" by a signal."""
    verdicts: tuple[Verdict, ...]
    """One verdict for each number of labels, from few to many. Empty if the run was stopped."""
    encoder: Path | None
    """Timm folder of the fine-tuned model: first approach, first seed, largest number of labels. None if the run was
    stopped."""
    plot: Path | None = None
    """Plot of the headline metric against the number of labels. None if there is only one number of labels."""
    signal: str | None = None
    """Name of the signal that stopped the run."""
    unread_classes: tuple[str, ...] = ()
    """Classes whose validation images were all unreadable."""
    underfit: str = ""
    """A sentence about a trial of the first approach that ended long before it fitted its training images. Empty if
    there is none."""

    @property
    def score(self) -> dict[str, Estimate]:
        """Return approach -> the task's headline metric, such as accuracy, with the largest number of labels."""
        return self.verdicts[-1].score if self.verdicts else {}

    @property
    def gain(self) -> Estimate | None:
        """Return pretrained - scratch, paired by seed, with the largest number of labels.

        None if one of the two approaches is missing.
        """
        return self.verdicts[-1].gain if self.verdicts else None

    def table(self) -> str:
        """Return the verdicts as a text table for people, followed by notes on unread classes and underfitting."""
        lines = [table(self.verdicts), name_unread(self.unread_classes) if self.unread_classes else "", self.underfit]
        return "\n".join(line for line in lines if line)


def finetune(recipe: FinetuneRecipe, resume: str = "never") -> FinetuneResult:
    """Run a recipe.

    Args:
        recipe: Recipe to run.
        resume: "never" if the run folder must be new, "auto" to continue an existing run, or "overwrite" to delete it.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    if resume not in ("never", "auto", "overwrite"):
        raise UserError(
            f"--resume {resume}: expected auto or never; fine-tuning has no single checkpoint to continue from"
        )
    with ExitStack() as until_the_end:
        run = prepare(recipe, resume, until_the_end)
        measured = run_trials(run)
        return write_result(run, measured) if measured is not None else _stopped(run)


def prepare(recipe: FinetuneRecipe, resume: str, until_the_end: ExitStack) -> Run:
    """Open and check the images, refuse a recipe that cannot run, and open the run folder.

    Args:
        recipe: Recipe as the user gave it.
        resume: "never", "auto" or "overwrite", see `finetune`.
        until_the_end: Stack whose contexts are left when the run ends, in reverse order.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    out = Path(recipe.out)
    check_devices(recipe.devices, os.environ)
    team = start_team(recipe.precision, recipe.trackers, recipe.hang_timeout_s, device=recipe.device)
    stop_request = until_the_end.enter_context(StopRequest())
    watch = until_the_end.enter_context(Watch(team.rank, team.world, out, hang_timeout_s=recipe.hang_timeout_s))
    check_source(recipe.encoder, key="encoder", more=("scratch",))
    recipe = resolve(recipe, recipe.encoder, warn=team.is_main)
    kind = open_label_kind(recipe)
    train_images = kind.open(recipe.data.train, key="data.train", classes=None)
    val_images = kind.open(recipe.data.val, key="data.val", classes=train_images.classes)
    check_run(recipe, team, kind, train_images, val_images)
    unlabeled = open_unlabeled(recipe, team, val_images)

    def collect_doubts() -> list[str]:
        warning_lines = doubt_teacher(recipe)
        for key, images in (("data.train", train_images), ("data.val", val_images)):
            warning_lines += kind.warnings(images, key)
            warning_lines += check_images(images, key, recipe.data.decoding(), recipe.data.max_bad_fraction)
        return warning_lines

    doubts = team.on_main(collect_doubts)
    teachers = recipe.distill.teacher if recipe.distill else ()
    of_train, of_val = train_images.fingerprint(), val_images.fingerprint()
    of_unlabeled = unlabeled.images.fingerprint if unlabeled else ""
    fingerprint = fingerprint_of_inputs(of_train + of_unlabeled, of_val, recipe.encoder, *teachers)
    until_the_end.enter_context(opened(team, recipe, resume, fingerprint=fingerprint))

    def status(state: str, **more: object) -> None:
        if team.is_main:
            write_status(out, state, **more)

    watch.status = status
    watch.at(0, "loading")
    run = Run(
        recipe, team, train_images, val_images, unlabeled, fingerprint, stop_request, watch, status, until_the_end
    )

    def record_start() -> None:
        write_json(out / "env.json", environment())
        write_status(out, "running")
        _record_data(run, same_images=of_train == of_val)
        if team.device.type == "cpu":
            for advice in advise_on_cpu(recipe.precision, team.world):
                print(f"note: {advice}", flush=True)
        for doubt in doubts:
            warnings.warn(doubt, MppWarning, stacklevel=2)

    team.on_main(record_start)
    return run


def run_trials(run: Run) -> dict[Trial, TrialResult] | None:
    """Train the trials that are not done yet, one after the other.

    Returns:
        The result of every trial, or None if a signal stopped the run.
    """
    trials = trials_of(run.recipe)
    measured: dict[Trial, TrialResult] = {}
    took_s: list[float] = []
    run.stop_request.listen()
    for number, trial in enumerate(trials):
        result = run.team.on_main(partial(read_result, trial.folder, run.fingerprint))
        if result is None:
            run.status("running", trial=trial.folder.name)
            if run.team.is_main:
                left_s = sum(took_s) / len(took_s) * (len(trials) - number) if took_s else 0
                left = f" (about {format_duration(left_s)} left for all of them)" if took_s else ""
                print(f"model {number + 1} of {len(trials)}: {trial.title}{left}", flush=True)
            began_s = time.monotonic()
            result = train(prepare_trial(run, trial))
            took_s.append(time.monotonic() - began_s)
            run.watch.status = run.status
            (stopping,) = run.team.sum([bool(run.stop_request)])
            if result is None or (stopping and number < len(trials) - 1):
                run.status("stopped", trial=trial.folder.name, why=run.stop_request.reason)
                return None
        measured[trial] = result
    return measured


def _stopped(run: Run) -> FinetuneResult:
    return FinetuneResult(Path(run.recipe.out), "stopped", (), None, signal=run.stop_request.of_all(run.team))


def write_result(run: Run, measured: dict[Trial, TrialResult]) -> FinetuneResult:
    """Compare the approaches for each number of labels, and write result.json and the plot."""
    recipe, out = run.recipe, Path(run.recipe.out)
    headline = registry.component("task", recipe.task.name).headline
    device = unit_of(run.team)
    before = {approach: minutes_before(recipe, approach, device) for approach in approaches_of(recipe)}
    verdicts = []
    for count in recipe.data.label_counts():
        of_approach = {
            approach: [r for t, r in measured.items() if (t.labels_per_class, t.approach) == (count, approach)]
            for approach in approaches_of(recipe)
        }
        metrics = {approach: [r.metrics for r in results] for approach, results in of_approach.items()}
        minutes = {
            approach: float(np.mean([r.device_minutes for r in results])) for approach, results in of_approach.items()
        }
        cost = Cost(device, before, minutes)
        verdicts.append(Verdict.of(count, metrics, headline, cost))
    shown = next(t for t in trials_of(recipe) if t.labels_per_class == verdicts[-1].labels_per_class)
    plot = out / PLOT if len(verdicts) > 1 else None
    unread = run.team.on_main(partial(read_unread_classes, shown.folder))
    result = FinetuneResult(
        out,
        "finished",
        tuple(verdicts),
        shown.folder / "encoder",
        plot,
        unread_classes=unread,
        underfit=run.team.on_main(partial(_name_underfit, run)),
    )

    def write() -> None:
        if plot:
            _plot(result, plot)
        write_json(
            out / RESULT,
            {
                "metric": verdicts[-1].metric,
                "score": {approach: asdict(e) for approach, e in result.score.items()},
                "gain": asdict(result.gain) if result.gain else None,
                "verdicts": [asdict(v) for v in verdicts],
                "seeds": list(recipe.seeds),
                "val_images": len(run.val),
                "unread_classes": list(unread),
                "encoder": str(result.encoder),
            },
        )

    run.team.on_main(write)
    run.status("finished")
    return result


def _name_underfit(run: Run) -> str:
    """Return a sentence with advice on an underfit trial of the first approach; "" if there is none."""
    recipe = run.recipe.model_dump(mode="json")
    first_approach = approaches_of(run.recipe)[0]
    for trial in (trial for trial in trials_of(run.recipe) if trial.approach == first_approach):
        if text := underfit(trial.folder.name, read_metrics(trial.folder), recipe, len(run.train.classes)):
            return f"{text} {UNDERFIT_ADVICE}"
    return ""


def _record_data(run: Run, *, same_images: bool) -> None:
    """Write data.json: numbers of images, and leaks of validation images into training. Warn of leaks in data.train."""
    recipe, train, val = run.recipe, run.train, run.val
    path = Path(recipe.out) / DATA
    try:
        if json.loads(path.read_text())["fingerprint"] == run.fingerprint:
            return  # a resumed run
    except (OSError, ValueError, KeyError, TypeError):
        pass
    leaked = leak(val.reader, train.reader)
    if same_images:
        warnings.warn("data.val: the same images as data.train; the accuracy is meaningless", MppWarning, stacklevel=3)
    elif leaked.shared:
        name, other = leaked.examples[0]
        warnings.warn(
            f"data.val: {leaked.shared} of {leaked.checked} images are also in data.train, such as {name} ({other})",
            MppWarning,
            stacklevel=3,
        )
    pretrained_on = _in_pretraining(recipe, val)
    write_json(
        path,
        {
            "fingerprint": run.fingerprint,
            "classes": len(train.classes),
            "train_images": len(train),
            "val_images": len(val),
            "val_in_train": leaked.to_json(),
            "val_in_pretraining": pretrained_on.to_json() if pretrained_on else None,
            "unlabeled": {"images": len(run.unlabeled), "left_out": run.unlabeled.left_out} if run.unlabeled else None,
            "left_out": {"train": train.left_out.found, "val": val.left_out.found},
        },
    )


def _in_pretraining(recipe: FinetuneRecipe, val: LabeledImages) -> Leak | None:
    """Return which validation images the encoder saw in pretraining.

    None if the encoder is not a local pretraining run, or if its shards are remote or no longer readable.
    """
    try:
        data = load_recipe(Path(recipe.encoder) / "recipe.yaml", PretrainRecipe).data
        if any(map(is_remote, data.shards)):
            return None  # remote shards are not downloaded for this check
        return leak(val.reader, PackedReader(ShardImages(data.shards, key="data.shards", **data.opening())))
    except UserError:
        return None


def _plot(result: FinetuneResult, out: Path) -> None:
    lines = []
    for approach in result.score:
        points = [(float(v.labels_per_class or 0), v.score[approach]) for v in result.verdicts]
        lines.append(line_of_scores(approach, points, dashed=approach == "scratch"))
    seeds = len(next(iter(result.score.values())).values)
    title = "mean of seeds, 95 % interval" if seeds > 1 else "one seed"
    draw({title: lines}, out, xlabel="labels a class", ylabel=f"{result.verdicts[-1].metric}, %", log_x=True)
