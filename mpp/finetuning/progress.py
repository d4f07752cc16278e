"""How far a trial of fine-tuning has come."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpp.recipe.flat import JsonObject
from mpp.runs.records import nan_if_null


@dataclass
class Progress:
    """The numbers of a trial that a checkpoint keeps beside the tensors."""

    step: int = 0
    """Optimizer steps that are done."""
    unreadable: int = 0
    """Images that could not be read so far."""
    skipped: int = 0
    """Steps that were left out because they were not finite."""
    best: float = -1.0
    """The best score on training images held out, if the recipe stops early."""
    best_step: int = 0
    since_best: int = 0
    """Measurements since the best one."""
    given_up: bool = False
    """Whether the score has not risen for so long that the trial ends early."""
    start_score: float = math.nan
    """The headline metric of the untrained model on the validation images, if its head begins as a probe."""
    device_minutes: float = 0.0
    """Minutes of CPU time, or of GPUs, of all processes, when last asked."""
    loss: float = math.nan
    """Of the newest step that was read, over all processes; not kept in checkpoints."""
    grad_norm: float = math.nan
    """As `loss`."""

    def to_json(self) -> JsonObject:
        """Return what state.json holds."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "worse": self.since_best,
            "given_up": self.given_up,
            "skipped": self.skipped,
            "bad": self.unreadable,
            "device_minutes": self.device_minutes if math.isfinite(self.device_minutes) else None,
            **({"start_score": self.start_score} if math.isfinite(self.start_score) else {}),
        }

    @staticmethod
    def from_json(state: JsonObject) -> Progress:
        """Return what `to_json` gave, with `step`."""
        return Progress(
            step=state["step"],
            unreadable=state["bad"],
            skipped=state["skipped"],
            best=state["best"],
            best_step=state["best_step"],
            since_best=state["worse"],
            given_up=state["given_up"],
            device_minutes=nan_if_null(state.get("device_minutes")),
            start_score=state.get("start_score", math.nan),
        )
