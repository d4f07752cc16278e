"""The loop of masked-patch pretraining. Read it from top to bottom."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mpp.data.unreadable import count_unreadable
from mpp.encoders.folder import pool_patches, save_encoder, trained_by
from mpp.parallel import faults
from mpp.parallel.liveness import SAVING
from mpp.pretraining.job import Pretraining
from mpp.pretraining.measure import measure, probe_at_start, record_of
from mpp.pretraining.setup import prepare
from mpp.recipe.pretrain import PretrainRecipe
from mpp.recipe.resume import length_of
from mpp.rng import Purpose, torch_seed
from mpp.runs import checkpoint
from mpp.training import nonfinite
from mpp.training.batch_norms import batch_norms_of, choose_batches, measure_batch_norms
from mpp.training.moving_average import average, decay_at
from mpp.training.steps import StepReport, StepReports, allow_unsaved, seed_dropout


@dataclass(frozen=True)
class PretrainResult:
    """The result of `pretrain`."""

    out: Path
    state: str
    """"finished", or "stopped" by a signal with a checkpoint to resume from."""
    step: int
    loss: float
    """Loss of the last step, over all processes."""
    skill: float
    """1 - loss / loss of the trivial predictor, on held-out images, as last measured."""
    encoder: Path | None
    """The timm folder of the encoder; None until the run is finished."""
    signal: str | None = None
    """Name of the signal that stopped the run."""


def pretrain(recipe: PretrainRecipe, resume: str = "never") -> PretrainResult:
    """Run a recipe.

    Args:
        recipe: The recipe to run.
        resume: "never" (the run folder must be new), "auto", "overwrite", or the folder of a checkpoint.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    with ExitStack() as until_the_end:
        return train(prepare(recipe, resume, until_the_end))


def train(job: Pretraining) -> PretrainResult:
    """Train until the last step, or until a signal asks to stop. One iteration of the loop is one optimizer step.

    The results of a step are read from the device in the next iteration, when the device is busy with the next step. So
    the host never waits for the device, except if something is due that needs the newest numbers.
    """
    recipe, team, plan, progress = job.recipe, job.team, job.plan, job.progress
    reports = StepReports(team, job.stop_request)
    job.wrapped.train()
    job.log.status("running", step=progress.step)
    job.stop_request.listen()
    probe_at_start(job)
    job.pace.begin()

    for step in range(progress.step, plan.total_steps):
        faults.point("train.step_begins")  # tests make processes fail here
        due = plan.due_after(step)  # names such as "log" or "checkpoint"; after the last step all of them and "end"

        # 1. Gradients of this process's micro-batches. Processes exchange gradients in the last backward pass of a
        #    step. A sharded model exchanges them in every backward pass, because a process has no room for the
        #    gradients of all shards.
        job.batch_norms.remember()
        for batch, is_last in job.micro_batches.of_step(step):
            seed_dropout(recipe.seed, batch)
            with team.accumulate(job.wrapped, exchange=is_last or job.sharded):
                losses = job.wrapped(batch.images, batch.units) / plan.micro_batches
                team.backward((losses * job.model.weights).sum())
            reports.add(batch, losses)
        grad_norm = team.clip_gradients(job.trained, recipe.optim.clip_grad_norm)

        # 2. The update. If the loss or the gradient norm is not finite, the device skips the whole update, including
        #    weight decay and moments, and restores the statistics of batch norms. The report of step N arrives in
        #    iteration N + 1, before the update of that iteration. If step N was skipped, the weights are still those
        #    that it ran with, and the step is kept with them for `mpp replay`. If something is due or the run stops,
        #    step N is reported in its own iteration.
        job.watch.at(step, "exchanging losses")
        finite = reports.send(step, grad_norm)
        job.batch_norms.restore(unless=finite)
        for report in reports.arrived(everything=bool(due)):
            account_for(report, job)
        lr = plan.lr(step)
        job.optimizer.update(lr=lr, only_if=finite)
        progress.step = step + 1
        job.model.after_step(progress.step, plan.total_steps, finite)  # targets that follow the encoder
        if job.averaged is not None and recipe.ema_decay:
            average(job.averaged, job.model.encoder.model, decay_at(recipe.ema_decay, progress.step), only_if=finite)
        job.pace.steps += 1
        job.log.step()

        # 3. What is due: measure on held-out images, write a line of metrics, save. If the run is asked to stop
        #    (SIGINT, SIGTERM, SIGUSR1, SIGHUP), it finishes its step, saves, and stops.
        job.watch.at(progress.step, SAVING)
        measured = measure(job, due)  # leaves the model in training mode
        if due or reports.stopping:
            progress.device_minutes = job.device_time.minutes()
        if "log" in due or measured or reports.stopping:
            job.log.metrics(record_of(job, lr, measured))
        if "checkpoint" in due or reports.stopping:
            save(job, required="end" in due or reports.stopping)
        if reports.stopping and "end" not in due:
            return stop(job)
    return finish(job)


def account_for(report: StepReport, job: Pretraining) -> None:
    """Process the report of a step: record the losses, keep a step that is not finite, count unreadable images.

    Every process calls this with the same numbers.

    Raises:
        UserError: If more steps were not finite, or more images unreadable, than the recipe allows.
    """
    recipe, progress = job.recipe, job.progress
    progress.losses, progress.grad_norm = report.losses, report.grad_norm
    progress.loss = sum(weight * loss for weight, loss in zip(job.model.loss_weights, report.losses, strict=True))
    seen_before = report.step * job.plan.global_batch_size
    if not report.is_finite:
        progress.skipped += 1
        keys = job.sampler.keys(seen_before)  # (position, shard, row) of the images of each micro-batch
        record = {
            "seeds": [torch_seed(recipe.seed, Purpose.STEP, position) for ((position, _, _), *_) in keys],
            "losses": nonfinite.losses_as_text(report.micro_losses, job.plan.micro_batches),
            "samples": [[job.dataset.images.name(shard, row) for _, shard, row in of_batch] for of_batch in keys],
        }
        line = nonfinite.keep_step(
            job.team,
            job.run.out,
            report.step,
            job.model,
            None,
            job.dataset,
            keys,
            record,
            what=f"step {report.step}: loss {progress.loss}, gradient norm {report.grad_norm}",
            skipped=progress.skipped,
            allowed=recipe.max_skipped_steps,
        )
        job.log.say(line)
    progress.unreadable = count_unreadable(
        job.team,
        progress.unreadable,
        report.unreadable,
        report.unreadable_lines,
        seen=(seen_before + job.plan.global_batch_size) // recipe.views,
        max_bad_fraction=recipe.data.max_bad_fraction,
        log=job.log,
    )


def save(job: Pretraining, *, required: bool) -> None:
    """Write a checkpoint.

    Args:
        job: The run.
        required: Whether the run ends if the checkpoint cannot be written, even if `if_unsaved` is go_on.

    Raises:
        UserError: If the checkpoint cannot be written, and the run must not continue without it.
    """
    seen = job.progress.step * job.plan.global_batch_size
    state = {"seen": seen, **job.progress.to_json(), "data_fingerprint": job.dataset.images.fingerprint}
    before_decay = job.plan.steps_before_decay
    state |= {"length": length_of(job.recipe), "steps_before_decay": before_decay}
    with allow_unsaved(job.log, required=required or job.recipe.if_unsaved == "stop"):
        checkpoint.save_together(
            job.team,
            job.run.out / "checkpoints",
            job.progress.step,
            job.model,
            job.optimizer.plain,
            state,
            keep=job.recipe.keep_checkpoints,
            keep_step=before_decay if job.recipe.optim.schedule == "wsd" else None,
            averaged=job.averaged,
        )
        job.log.status("running", step=job.progress.step)


def stop(job: Pretraining) -> PretrainResult:
    """End a run that a signal stopped, after it has saved."""
    progress = job.progress
    why = job.stop_request.reason
    signal = job.stop_request.of_all(job.team)
    job.log.say(f"stopped at step {progress.step} by {why}; continue with --resume auto")
    job.log.status("stopped", step=progress.step, why=why)
    return PretrainResult(job.run.out, "stopped", progress.step, progress.loss, progress.skill, None, signal)


def finish(job: Pretraining) -> PretrainResult:
    """Write the encoder as a timm folder whose embedding is the mean of the patch tokens.

    If the encoder has batch norms, their statistics are measured again on the held-out images without masks, because in
    training parts of the images were hidden.
    """
    progress, folder = job.progress, job.run.out / "encoder"
    metrics = {"step": progress.step, "loss": progress.loss, "skill": progress.skill}
    metrics[job.device_time.key] = progress.device_minutes
    with job.whole_encoder() as encoder:
        pool_patches(encoder)
        images = job.held_out.images
        chosen = choose_batches(range(len(images)))

        def measure_and_save() -> None:
            with job.team.autocast():
                batches = (job.model.images(images[rows].to(job.team.device)).normalised for rows in chosen)
                measure_batch_norms(encoder, batch_norms_of(encoder), batches)
            save_encoder(encoder, folder, trained_by(job.recipe), metrics)

        job.team.on_main(measure_and_save)
    job.log.status("finished", step=progress.step)
    return PretrainResult(job.run.out, "finished", progress.step, progress.loss, progress.skill, folder)
