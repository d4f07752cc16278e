"""A trial of a fine-tuning run: one model that it trains, by one approach, one seed and one number of labels."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mpp.errors import UserError
from mpp.finetuning.approaches import approaches_of
from mpp.recipe.finetune import FinetuneRecipe
from mpp.runs.records import steps

RESULT = "result.json"


@dataclass(frozen=True)
class Trial:
    """One approach with one seed and one number of labels. It has a folder with checkpoints and a result of its own."""

    folder: Path
    approach: str
    """"pretrained", "scratch", "cnn" or "published"."""
    seed: int
    labels_per_class: int | None

    @property
    def title(self) -> str:
        """What is trained, in words."""
        labels = f"{self.labels_per_class} labels a class, " if self.labels_per_class else ""
        return f"{self.approach}, {labels}seed {self.seed}"


def trials_of(recipe: FinetuneRecipe) -> list[Trial]:
    """Return the trials of a run in their order. A folder is named after the number of labels if there are several."""
    counts = recipe.data.label_counts()
    return [
        Trial(
            Path(recipe.out) / (f"labels{count}-" * (len(counts) > 1) + f"{approach}-seed{seed}"), approach, seed, count
        )
        for count in counts
        for seed in recipe.seeds
        for approach in approaches_of(recipe)
    ]


def parse_folder(folder: Path) -> tuple[str, int] | None:
    """Return approach and seed of a trial from the name of its folder, or of `encoder` in it; None if it is not one."""
    name = folder.parent.name if folder.name == "encoder" else folder.name
    found = re.fullmatch(r"(?:labels\d+-)?([a-z]+)-seed(\d+)", name)
    return (found[1], int(found[2])) if found else None


class TrialResult(NamedTuple):
    """What came of a trial."""

    metrics: dict[str, float]
    """On the validation images."""
    device_minutes: float
    """What its training took; nan where a trial did not keep it."""


def read_result(trial: Path, fingerprint: str) -> TrialResult | None:
    """Return what came of a trial that is done, or None.

    Raises:
        UserError: They were measured on other data, or from another encoder.
    """
    try:
        result = json.loads((trial / RESULT).read_text())
        metrics = {k: math.nan if v is None else float(v) for k, v in result["metrics"].items()}
        before = result["fingerprint"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    if before != fingerprint:
        raise UserError(f"{trial}: the data or the encoder changed since; start a new run")
    return TrialResult(metrics, _read_minutes(trial))


def _read_minutes(trial: Path) -> float:
    """What training took, as the last checkpoint says: result.json is the same for every run of a recipe."""
    try:
        newest = steps(trial / "checkpoints")[0]
        return float(json.loads((newest / "state.json").read_text())["device_minutes"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return math.nan


def read_unread_classes(trial: Path) -> tuple[str, ...]:
    """Return the classes of whose validation images a finished trial could read none."""
    return tuple(json.loads((trial / RESULT).read_text()).get("unread_classes", ()))
