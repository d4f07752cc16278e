"""Results of an evaluation, and how they are printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mpp.evaluation.features import Place
from mpp.evaluation.probes import ARMS, PROTOCOL
from mpp.runs.verdict import aligned

RESULT = "result.json"
PLOT = "evaluation.png"
FEW = 200
"""Images by which a choice is partly chance: an accuracy of one half is known to 7 points (95 %) by so many."""


@dataclass(frozen=True)
class Score:
    """One probe at one place."""

    probe: str
    layer: str
    pool: str
    accuracy: float
    """On the validation images."""
    tune_accuracy: float
    """On the part of the training images by which things are chosen."""
    chosen: float
    """k, weight decay or learning rate."""
    sweep: dict[str, float]
    """k -> validation accuracy; weight decay or learning rate -> tune accuracy."""

    @property
    def place(self) -> Place:
        return Place(self.layer, self.pool)


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` returns."""

    out: Path
    scores: dict[str, list[Score]]
    """Arm ("encoder", "compare", "random", "pixels") -> all its scores."""
    chance: float
    """Accuracy of always saying the most frequent class of the validation images."""
    plot: Path
    chosen_by: int
    """Training images held out, by which layer and values were chosen."""

    def best(self, arm: str, probe: str) -> Score | None:
        """The score at the place that was best on the tune part; None where this arm was not probed so."""
        of_probe = [s for s in self.scores.get(arm, []) if s.probe == probe]
        return max(of_probe, key=lambda s: s.tune_accuracy) if of_probe else None

    def table(self) -> str:
        """For people."""
        probes = list(dict.fromkeys(s.probe for scores in self.scores.values() for s in scores))
        rows = [["", *probes]]
        for arm in self.scores:
            cells = [self.best(arm, probe) for probe in probes]
            rows.append([ARMS[arm], *(f"{100 * s.accuracy:.1f} %  {s.place}" if s else "-" for s in cells)])
        rows.append(["the most frequent class", *[f"{100 * self.chance:.1f} %"] * len(probes)])
        lines = aligned(rows)
        for probe in probes:
            best = self.best("encoder", probe)
            for arm in ("random", "pixels"):
                control = self.best(arm, probe)
                if best and control and best.accuracy <= control.accuracy:
                    lines.append(f"{probe}: the encoder's features are no better than {ARMS[arm]} here")
        if "linear" in probes:
            lines.append(PROTOCOL)
        if self.chosen_by < FEW:
            lines.append(
                f"layers and values were chosen by {self.chosen_by} held-out training images: partly by chance"
            )
        return "\n".join(lines)


S = TypeVar("S", int, float)


def best_setting(sweep: dict[S, float], *, smaller: bool) -> S:
    """What has the highest accuracy; of equals the smaller, or the larger."""
    return max(sweep, key=lambda value: (sweep[value], -value if smaller else value))


def sweep_as_text(sweep: Mapping[S, float]) -> dict[str, float]:
    """With keys that JSON can hold."""
    return {f"{value:g}": accuracy for value, accuracy in sweep.items()}
