"""The progress of a fine-tuning trial."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpp.recipe.flat import JsonObject
from mpp.runs.records import nan_if_null


@dataclass
class Progress:
    """The progress of a trial in numbers. A checkpoint keeps them next to the tensors."""

    step: int = 0
    """Number of finished optimizer steps."""
    unreadable: int = 0
    """Number of images that could not be read so far."""
    skipped: int = 0
    """Number of steps whose update was skipped because the loss or the gradient norm was not finite."""
    best: float = -1.0
    """Best score on held-out training images, if the recipe stops early."""
    best_step: int = 0
    """Number of finished steps at the best score."""
    since_best: int = 0
    """Number of measurements since the best score."""
    given_up: bool = False
    """Whether the trial ends early because the score has stopped rising."""
    start_score: float = math.nan
    """Headline metric on the validation images before the first step, if the head begins as a probe."""
    device_minutes: float = 0.0
    """Minutes of CPU or GPU time of all processes, at the last measurement."""
    mean_prediction: list[float] | None = None
    """Mean probability of each class on unlabeled images, if mixmatch aligns its predictions."""
    loss: float = math.nan
    """Loss of the newest reported step, over all processes. Checkpoints do not keep it."""
    grad_norm: float = math.nan
    """Gradient norm of the newest reported step. Checkpoints do not keep it."""

    def to_json(self) -> JsonObject:
        """Return the values that a checkpoint keeps in state.json, except the step."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "worse": self.since_best,
            "given_up": self.given_up,
            "skipped": self.skipped,
            "bad": self.unreadable,
            "device_minutes": self.device_minutes if math.isfinite(self.device_minutes) else None,
            **({"start_score": self.start_score} if math.isfinite(self.start_score) else {}),
            **({"mean_prediction": self.mean_prediction} if self.mean_prediction else {}),
        }

    @staticmethod
    def from_json(state: JsonObject) -> Progress:
        """Return the progress of a checkpoint from its state.json: the values of `to_json` and `step`."""
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
            mean_prediction=state.get("mean_prediction"),
        )
