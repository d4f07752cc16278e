"""The results of an evaluation, and their table."""

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
"""If a choice is made by fewer images than this, it is partly chance.

With this number of images, the 95 % interval of an accuracy of one half is ± 7 points."""


@dataclass(frozen=True)
class Score:
    """The score of one probe at one layer and pooling."""

    probe: str
    layer: str
    pool: str
    accuracy: float
    """Accuracy on the validation images."""
    tune_accuracy: float
    """Accuracy on the tune part, the training images by which settings are chosen."""
    chosen: float
    """Chosen k, weight decay or learning rate."""
    sweep: dict[str, float]
    """k -> validation accuracy; weight decay or learning rate -> tune accuracy."""

    @property
    def place(self) -> Place:
        return Place(self.layer, self.pool)


@dataclass(frozen=True)
class EvaluateResult:
    """The result of `evaluate`."""

    out: Path
    scores: dict[str, list[Score]]
    """Arm ("encoder", "compare", "random", "pixels") -> all its scores."""
    chance: float
    """Accuracy of always predicting the most frequent class of the validation images."""
    plot: Path
    chosen_by: int
    """Number of held-out training images by which layer and settings were chosen."""

    def best(self, arm: str, probe: str) -> Score | None:
        """Return the score at the layer and pooling that were best on the tune part.

        It is None if the arm has no scores of this probe.
        """
        of_probe = [s for s in self.scores.get(arm, []) if s.probe == probe]
        return max(of_probe, key=lambda s: s.tune_accuracy) if of_probe else None

    def table(self) -> str:
        """Return the best scores as text for the terminal."""
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
    """Return the setting with the highest accuracy; in a tie the smallest, or the largest if not `smaller`."""
    return max(sweep, key=lambda value: (sweep[value], -value if smaller else value))


def sweep_as_text(sweep: Mapping[S, float]) -> dict[str, float]:
    """Return a sweep whose keys are text, as JSON requires."""
    return {f"{value:g}": accuracy for value, accuracy in sweep.items()}
