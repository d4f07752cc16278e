"""The progress of a pretraining run, and what was measured during it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mpp.pretraining.monitor import Probed, Spread
from mpp.recipe.flat import JsonObject
from mpp.runs.records import nan_if_null
from mpp.runs.symptoms import Measured


@dataclass
class Progress:
    """The numbers of a run that a checkpoint keeps in addition to the tensors."""

    step: int = 0
    """Number of optimizer steps that are done."""
    unreadable: int = 0
    """Number of images that could not be read so far."""
    skipped: int = 0
    """Number of steps that were skipped because they were not finite."""
    loss: float = math.nan
    """Loss of the newest step that was read from the device, over all processes."""
    skills: list[float] = field(default_factory=list)
    """1 - loss / loss of the trivial predictor of each objective, on held-out images, as last measured."""
    collapse: dict[str, tuple[float, float]] = field(default_factory=dict)
    """(effective rank, share that depends on the image) by name of each target that may collapse."""
    features: Spread | None = None
    history: list[Measured] = field(default_factory=list)
    """Skill and probe accuracy at each measurement."""
    probed: Probed | None = None
    probe_at_start: float | None = None
    """Accuracy of the probe with the trained weights that the run started from. None if it was not measured."""
    probe_fingerprint: str = ""
    """Fingerprint of the images on which `probe_at_start` was measured."""
    device_minutes: float = 0.0
    """Minutes of CPU time, or of GPU time, of all processes, as last measured."""
    losses: list[float] = field(default_factory=list)
    """Each loss of the model in the same step as `loss`; not kept in checkpoints."""
    grad_norm: float = math.nan
    """Norm of the gradient in the same step; not kept in checkpoints."""

    @property
    def skill(self) -> float:
        """Skill of the first objective."""
        return self.skills[0]

    def to_json(self) -> JsonObject:
        """Return the values for state.json, except `step`, with null for numbers that are not finite."""
        return {
            "bad": self.unreadable,
            "skipped": self.skipped,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "skills": [None if math.isnan(value) else value for value in self.skills],
            "collapse": self.collapse,
            "features": [*self.features] if self.features else None,
            "history": [[*m] for m in self.history],
            "probed": [*self.probed] if self.probed else None,
            "probe_at_start": self.probe_at_start,
            "probe_fingerprint": self.probe_fingerprint,
            "device_minutes": self.device_minutes if math.isfinite(self.device_minutes) else None,
        }

    @staticmethod
    def from_json(state: JsonObject) -> Progress:
        """Return the progress in the values of `to_json` and `step`."""
        return Progress(
            step=state["step"],
            unreadable=int(state["bad"]),
            skipped=int(state["skipped"]),
            loss=nan_if_null(state["loss"]),
            skills=[nan_if_null(value) for value in state["skills"]],
            collapse=state["collapse"],
            features=Spread(*state["features"]) if state["features"] else None,
            history=[Measured(*m) for m in state["history"]],
            probed=Probed(*state["probed"]) if state["probed"] else None,
            probe_at_start=state.get("probe_at_start"),
            probe_fingerprint=state.get("probe_fingerprint", ""),
            device_minutes=nan_if_null(state.get("device_minutes")),
        )
