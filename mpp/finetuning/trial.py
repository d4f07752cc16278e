"""A trial of a fine-tuning run: one model, trained by one approach, with one seed and one number of labels."""

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
from mpp.runs.records import checkpoints_in

RESULT = "result.json"


@dataclass(frozen=True)
class Trial:
    """One approach with one seed and one number of labels. Its folder contains its checkpoints and its result."""

    folder: Path
    approach: str
    """"pretrained", "scratch", "cnn" or "published"."""
    seed: int
    labels_per_class: int | None

    @property
    def title(self) -> str:
        """Return a description of the trial for people."""
        labels = f"{self.labels_per_class} labels a class, " if self.labels_per_class else ""
        return f"{self.approach}, {labels}seed {self.seed}"


def trials_of(recipe: FinetuneRecipe) -> list[Trial]:
    """Return the trials of a run in order. Folder names contain the number of labels if there are several numbers."""
    counts = recipe.data.label_counts()
    return [
        Trial(
            Path(recipe.out) / (f"labels{count}-" * (len(counts) > 1) + f"{approach}-seed{seed}"), approach, seed, count
        )
        for count in counts
        for seed in recipe.seeds
        for approach in approaches_of(recipe)
    ]


class TrialName(NamedTuple):
    """What the name of a trial's folder contains."""

    approach: str
    seed: int


def parse_folder(folder: Path) -> TrialName | None:
    """Return approach and seed of a trial from the path of its folder or of the folder `encoder` in it.

    None if the name is not that of a trial.
    """
    name = folder.parent.name if folder.name == "encoder" else folder.name
    found = re.fullmatch(r"(?:labels\d+-)?([a-z]+)-seed(\d+)", name)
    return TrialName(found[1], int(found[2])) if found else None


class TrialResult(NamedTuple):
    """The result of a trial."""

    metrics: dict[str, float]
    """Metrics on the validation images."""
    device_minutes: float
    """Minutes of CPU or GPU time of its training. nan if the trial did not keep them."""


def read_result(trial: Path, fingerprint: str) -> TrialResult | None:
    """Return the result of a trial, or None if the trial is not finished.

    Raises:
        UserError: If the result was measured on other data or with another encoder.
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
    """Return the device minutes of training from the last checkpoint; nan if they were not kept.

    They are not in result.json, because that file must be the same for every run of a recipe.
    """
    try:
        newest = checkpoints_in(trial / "checkpoints")[0]
        return float(json.loads((newest / "state.json").read_text())["device_minutes"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return math.nan


def read_unread_classes(trial: Path) -> tuple[str, ...]:
    """Return the classes whose validation images were all unreadable for a finished trial."""
    return tuple(json.loads((trial / RESULT).read_text()).get("unread_classes", ()))
