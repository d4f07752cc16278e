"""Train one trial of a fine-tuning run. The file reads from top to bottom."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mpp.data.loader import batches
from mpp.data.unreadable import count_unreadable
from mpp.finetuning import lora
from mpp.finetuning.job import Finetuning
from mpp.finetuning.judge import Judged, judge
from mpp.finetuning.model import save as save_model
from mpp.finetuning.trial import RESULT, TrialResult
from mpp.finetuning.unlabeled import first_unlabeled_step, unlabeled_per_label
from mpp.parallel import faults
from mpp.parallel.liveness import SAVING
from mpp.runs import checkpoint
from mpp.runs.records import write_json
from mpp.runs.verdict import name_unread
from mpp.training import nonfinite
from mpp.training.batch_norms import AT_ONCE, batch_norms_of, choose_batches, measure_batch_norms
from mpp.training.moving_average import average, decay_at
from mpp.training.steps import StepReport, StepReports, allow_unsaved

PREDICTIONS = "predictions.png"


def train(job: Finetuning) -> TrialResult | None:
    """Train until the last step, until the score stops improving, or until a signal asks to stop.

    One iteration of the loop is one optimizer step. The results of a step are read from the device in the next
    iteration, when the device is busy with the next step. So the host waits for the device only if something is due
    that needs the newest numbers.

    Returns:
        The result of the trial, or None if a signal stopped the trial. A stopped trial has saved a checkpoint.
    """
    run, plan, progress = job.run, job.plan, job.progress
    recipe, team = job.recipe, run.team
    reports = StepReports(team, run.stop_request)
    job.log.status("running", step=progress.step)
    if recipe.head_init == "probe" and progress.step == 0:
        progress.start_score = judge_start(job)
    job.pace.begin()

    for step in range(progress.step, plan.total_steps):
        if progress.given_up:  # a resumed trial that had already ended early
            break
        faults.point("train.step_begins")  # tests make processes fail here
        due = plan.due_after(step)  # a part of log, checkpoint and held_out; all of them and "end" after the last step
        job.wrapped.train()  # a measurement leaves the model in eval mode
        job.model.encoder.train(step >= job.encoder_learns_at)  # a frozen encoder keeps the statistics of batch norms

        # 1. Compute the gradients of this process's micro-batches. They are exchanged in the last backward pass of the
        #    step. The micro-loss seeds dropout and augmentation on the device. Gradients of parameters that are still
        #    frozen are discarded.
        job.batch_norms.remember()
        for batch, is_last in job.micro_batches.of_step(step):
            with team.accumulate(job.wrapped, exchange=is_last):
                loss = job.micro_loss(job.wrapped, batch, int(batch.positions[0]))
                loss = loss / plan.micro_batches
                team.backward(loss)
            reports.add(batch, loss.view(1))
        job.drop_frozen_gradients(step)
        grad_norm = team.clip_gradients(job.learning_parameters(step), recipe.optim.clip_grad_norm)

        # 2. Update the weights. If the loss or the gradient norm is not finite, the device skips the update, including
        #    weight decay and moments, and restores the statistics of batch norms. The report of step N arrives in
        #    iteration N + 1, before the update of that iteration. So if step N was skipped, its weights are unchanged
        #    and are kept for `mpp replay`. If something is due or the run stops, step N is reported in iteration N.
        run.watch.at(step, "exchanging losses")
        finite = reports.send(step, grad_norm)
        job.batch_norms.restore(unless=finite)
        for report in reports.arrived(everything=bool(due)):
            account_for(report, job)
        lr = plan.lr(step)
        job.optimizer.update(lr=lr, only_if=finite)
        progress.step = step + 1
        if job.averaged is not None and recipe.ema_decay:
            average(job.averaged, job.model, decay_at(recipe.ema_decay, progress.step), only_if=finite)
        job.micro_loss.end_step(team, only_if=finite)
        job.pace.steps += 1
        job.log.step()

        # 3. Do what is due: judge on held-out training images, write a line of metrics, save a checkpoint. If a signal
        #    asks the trial to stop (SIGINT, SIGTERM, SIGUSR1, SIGHUP), it finishes its step, saves, and stops.
        run.watch.at(progress.step, SAVING)
        score = judge_held_out(job) if "held_out" in due else {}
        ending = reports.stopping or progress.given_up or "end" in due
        if due or ending:
            progress.device_minutes = job.device_time.minutes()
        if "log" in due or score or ending:
            job.log.metrics(record_of(job, lr, score))
        if "checkpoint" in due or ending:
            save(job, required=ending)
        if reports.stopping and "end" not in due and not progress.given_up:
            stop(job)
            return None
        if progress.given_up:
            break
    return finish(job)


def account_for(report: StepReport, job: Finetuning) -> None:
    """Process the report of a step: record its loss, keep a step that is not finite, count unreadable images.

    Every process calls this with the same numbers.

    Raises:
        UserError: If more steps were not finite, or more images were unreadable, than the recipe allows.
    """
    run, progress, folder = job.run, job.progress, job.trial.folder
    recipe, train = job.recipe, run.train
    (progress.loss,), progress.grad_norm = report.losses, report.grad_norm
    seen_before = report.step * job.plan.global_batch_size
    if not report.is_finite:
        progress.skipped += 1
        weights = job.model.task.class_weights
        keys = job.sampler.keys(seen_before)  # for each micro-batch (position, 0, index in the subset) of its images
        record = {
            "approach": job.trial.approach,
            "total_steps": job.plan.total_steps,
            "encoder_learns": report.step >= job.encoder_learns_at,
            "seed": job.trial.seed,
            "classes": train.classes,
            "class_weights": None if weights is None else weights.tolist(),
            "class_counts": job.micro_loss.class_counts,
            "mean_prediction": job.micro_loss.mean_prediction(),
            "seeds": [position for ((position, _, _), *_) in keys],
            "losses": nonfinite.losses_as_text(report.micro_losses, job.plan.micro_batches),
            "samples": [[train.reader.name(int(job.subset[place])) for _, _, place in of_batch] for of_batch in keys],
        }
        line = nonfinite.keep_step(
            run.team,
            folder,
            report.step,
            job.model,
            job.averaged if recipe.unlabeled else None,
            job.dataset,
            keys,
            record,
            what=f"{folder.name} step {report.step}: loss {progress.loss}, gradient norm {report.grad_norm}",
            skipped=progress.skipped,
            allowed=recipe.max_skipped_steps,
        )
        job.log.say(line)
    labeled = seen_before + job.plan.global_batch_size
    alone = first_unlabeled_step(recipe, job.plan.total_steps) * job.plan.global_batch_size
    unlabeled = unlabeled_per_label(recipe) * max(0, labeled - alone)
    progress.unreadable = count_unreadable(
        run.team,
        progress.unreadable,
        report.unreadable,
        report.unreadable_lines,
        seen=labeled + unlabeled,
        max_bad_fraction=recipe.data.max_bad_fraction,
        log=job.log,
    )


def judge_start(job: Finetuning) -> float:
    """Return the score of a model whose head begins as a probe, before its first step, to compare the end with it."""
    run, headline = job.run, job.model.task.headline
    val = np.arange(len(run.val))
    judged = judge(
        job.recipe, run.team, job.kind, job.model, run.val, val, "data.val",
        views=job.recipe.data.val_views, headline_only=True,
    )  # fmt: skip
    score = judged.metrics[headline]
    job.log.say(f"{headline} of the start, a linear probe: {100 * score:.2f} %")
    return score


def judge_held_out(job: Finetuning) -> dict[str, float]:
    """Judge on held-out training images, keep the best weights, and give up after too many scores without a new best.

    Returns:
        The score by its name, for a line of metrics.
    """
    run, progress, headline = job.run, job.progress, job.model.task.headline
    assert job.recipe.early_stop is not None
    adjust_batch_norms(job)
    judged = judge(
        job.recipe, run.team, job.kind, job.judged, run.train, job.held_out, "early_stop",
        views=1, headline_only=True,
    )  # fmt: skip
    score = judged.metrics[headline]
    progress.since_best += 1
    if progress.step <= first_unlabeled_step(job.recipe, job.plan.total_steps):
        progress.since_best = 0  # the score may rise again with the unlabeled images
    if score > progress.best:
        progress.best, progress.best_step, progress.since_best = score, progress.step, 0
        folder = job.trial.folder / "best"
        checkpoint.save_together(run.team, folder, progress.step, job.model, None, {}, keep=None, averaged=job.averaged)
    progress.given_up = progress.since_best >= job.recipe.early_stop.patience
    return {f"tune_{headline}": score}


def adjust_batch_norms(job: Finetuning) -> None:
    """Give the batch norms of the judged model the statistics of training images prepared as for judging.

    For labels at places, whole images have many sizes, so the statistics are measured on crops, as in training. A
    frozen encoder keeps its statistics. Heads have no batch norms. Every process calls this: the main process measures,
    and `judge` copies its statistics to the others.
    """
    model, kind, train = job.judged, job.kind, job.run.train
    norms = batch_norms_of(model)
    if not norms or job.progress.step <= job.encoder_learns_at:
        return
    most = min(AT_ONCE, job.recipe.optim.max_batch_per_device)
    if kind.at_every_place:
        dataset, chosen = kind.training_set(train, job.subset, job.trial.seed), range(len(job.subset))
        keys: list[list[Any]] = [[(i, 0, i) for i in places] for places in choose_batches(chosen, most)]
    else:
        dataset, keys = kind.judging_set(train), choose_batches(job.subset.tolist(), most)

    def measure() -> None:
        loaded = batches(dataset, keys, workers=job.recipe.data.workers, pin_memory=False)
        readable = (batch.images[batch.readable] for batch in loaded)
        normalised = (model.normalise(x.to(model.mean.device)) for x in readable if len(x) > 1)
        with job.run.team.autocast():
            measure_batch_norms(model, norms, normalised)

    job.run.team.on_main(measure)


def record_of(job: Finetuning, lr: float, score: dict[str, float]) -> dict[str, float]:
    """Return a line of metrics.

    Args:
        job: The trial.
        lr: Learning rate of the step.
        score: Score on held-out training images; empty unless this step measured it.
    """
    progress, global_batch = job.progress, job.plan.global_batch_size
    record = {"step": progress.step, "seen": progress.step * global_batch, "loss": progress.loss, "lr": lr, **score}
    record |= {"grad_norm": progress.grad_norm, **job.pace.rates(global_batch)}
    return record | {job.device_time.key: progress.device_minutes}


def save(job: Finetuning, *, required: bool) -> None:
    """Write a checkpoint, then delete all best weights except those that this checkpoint names.

    Args:
        job: The trial.
        required: Whether the run ends if the checkpoint cannot be written, regardless of the recipe's `if_unsaved`.

    Raises:
        UserError: If the checkpoint cannot be written and the run must not continue without it.
    """
    run, progress, folder = job.run, job.progress, job.trial.folder
    seen = progress.step * job.plan.global_batch_size
    progress.mean_prediction = job.micro_loss.mean_prediction()
    state = {"seen": seen, "data_fingerprint": run.fingerprint, **progress.to_json()}
    with allow_unsaved(job.log, required=required or job.recipe.if_unsaved == "stop"):
        checkpoint.save_together(
            run.team,
            folder / "checkpoints",
            progress.step,
            job.model,
            job.optimizer.plain,
            state,
            keep=job.recipe.keep_checkpoints,
            averaged=job.averaged,
        )
        if run.team.is_main:
            checkpoint.keep_only(folder / "best", progress.best_step)


def stop(job: Finetuning) -> None:
    """Record that a signal stopped the trial, after the trial has saved a checkpoint."""
    step, why = job.progress.step, job.run.stop_request.reason
    job.log.say(f"stopped at step {step} by {why}; continue with --resume auto")
    job.log.status("stopped", step=step, why=why)


def finish(job: Finetuning) -> TrialResult:
    """Choose the final weights, merge adapters, judge on the validation images, and write the model.

    If the recipe stops early, the weights are the best ones on held-out training images. Otherwise they are those of
    the last step. Validation images never decide which weights are taken.
    """
    run, progress, folder, model = job.run, job.progress, job.trial.folder, job.judged
    if job.recipe.early_stop:
        best = folder / "best" / f"step-{progress.best_step:08d}"
        checkpoint.load(best, job.model, averaged=job.averaged, checked=True)
        held_out = f"best on {len(job.held_out)} training images held out, {100 * progress.best:.2f} %"
        job.log.say(f"step {progress.best_step} of {progress.step}: {held_out}")
    else:  # the last weights need measured statistics; the best weights were saved with theirs
        adjust_batch_norms(job)
    if job.recipe.lora:  # merged before judging, so that exactly the exported model is judged
        lora.merge(model.encoder)
    val, views = np.arange(len(run.val)), job.recipe.data.val_views
    judged = judge(job.recipe, run.team, job.kind, model, run.val, val, "data.val", views=views)
    if math.isfinite(progress.start_score):
        judged.metrics[f"start_{job.model.task.headline}"] = progress.start_score

    def write() -> None:
        save_model(model, folder, job.recipe, judged.metrics, run.train.classes)
        job.kind.draw(model, run.val, folder / PREDICTIONS)
        _record_result(job, judged)  # last, because a trial with a result is not run again

    run.team.on_main(write)
    job.log.close()
    return TrialResult(judged.metrics, progress.device_minutes)


def _record_result(job: Finetuning, judged: Judged) -> None:
    """Write result.json and the last lines of the log."""
    headline, classes = job.model.task.headline, job.run.train.classes
    unreadable = f", {judged.unreadable} unreadable images left out" if judged.unreadable else ""
    job.log.say(f"{headline} {100 * judged.metrics[headline]:.2f} %{unreadable}")
    for line in judged.unreadable_lines:
        job.log.note(f"unreadable, data.val: {line}")
    if judged.unread_classes:
        job.log.say(f"warning: {name_unread(judged.unread_classes)}")
    job.log.status("finished", step=job.progress.step)
    of_class = {} if judged.per_class is None else dict(zip(classes, judged.per_class, strict=True))
    write_json(
        job.trial.folder / RESULT,
        {
            "metrics": judged.metrics,
            **({f"{headline}_per_class": of_class} if judged.per_class is not None else {}),
            "unreadable": judged.unreadable,
            "unread_classes": judged.unread_classes,
            "step": job.progress.step,
            "fingerprint": job.run.fingerprint,
        },
    )
