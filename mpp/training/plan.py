"""The plan of a run: its steps, learning rates, and what is due after which step. All functions are pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpp.training.optimizer import Schedule, last_full_rate_step, scheduled_lr

PER_IMAGES = 256
"""Batch size in images for which recipes give learning rates. The rates scale with the global batch (Goyal et al.
2017)."""


@dataclass(frozen=True)
class Plan:
    """The length of a run, its learning rates, and the intervals of everything that is done now and then."""

    total_steps: int
    warmup_steps: int
    global_batch_size: int
    """Images of one optimizer step, over all processes."""
    micro_batches: int
    """Micro-batches of one step on each process."""
    base_lr: float
    """Learning rate for a batch of 256 images, as in recipes."""
    min_lr: float
    """Learning rate at the end of the schedule, for 256 images."""
    every_steps: Mapping[str, int]
    """Interval in steps by name of what is due, such as "log" or "checkpoint"."""
    log_first_step: bool = False
    schedule: Schedule = "cosine"
    save_before_decay: bool = False
    """Whether a checkpoint is due before the learning rate of `wsd` falls."""

    def lr(self, step: int) -> float:
        """Return the learning rate of a step, numbered from 0."""
        lr = scheduled_lr(
            step,
            schedule=self.schedule,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            lr=self.base_lr,
            min_lr=self.min_lr,
        )
        return self.global_batch_size / PER_IMAGES * lr

    @property
    def steps_before_decay(self) -> int:
        """Number of steps before the learning rate falls. Until then, a longer run computes the same.

        The rate of a cosine depends on the length of the run from the start, at least after the warm-up.
        """
        return last_full_rate_step(self.schedule, total_steps=self.total_steps, warmup_steps=self.warmup_steps)

    def due_after(self, step: int) -> frozenset[str]:
        """Return the names of what is due after a step, numbered from 0. After the last step, all names and "end"."""
        if step + 1 == self.total_steps:
            return frozenset((*self.every_steps, "end"))
        due = {name for name, steps in self.every_steps.items() if (step + 1) % steps == 0}
        if self.save_before_decay and self.schedule == "wsd" and step + 1 == self.steps_before_decay:
            due.add("checkpoint")  # from here, the run can be made longer
        return frozenset(due | {"log"} if step == 0 and self.log_first_step else due)

    @property
    def never_reaches_full_lr(self) -> bool:
        """Whether the warm-up lasts longer than the run."""
        return self.warmup_steps > self.total_steps

    @property
    def warm_up_note(self) -> str:
        """Warning for the end of a log's first line; "" if the warm-up ends in time."""
        note = "; the warm-up lasts longer: the full learning rate is never reached"
        return note if self.never_reaches_full_lr else ""


def steps_of(epochs: float | None, steps: int | None, images: int, global_batch: int, *, least: int = 1) -> int:
    """Return the optimizer steps of a run or a warm-up, given in epochs or in steps.

    Args:
        epochs: Passes over the images; used if `steps` is None.
        steps: Optimizer steps.
        images: Images of one epoch.
        global_batch: Images of one step.
        least: Smallest result if the length is given in epochs.
    """
    return steps if steps is not None else max(round((epochs or 0.0) * images / global_batch), least)
