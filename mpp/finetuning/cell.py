"""A cell of a fine-tuning run: one arm, pretrained or from scratch, with one seed and one number of labels."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mpp.errors import UserError
from mpp.finetuning.arms import arms_of
from mpp.recipe.finetune import FinetuneRecipe
from mpp.runs.records import steps

RESULT = "result.json"


@dataclass(frozen=True)
class Cell:
    """One arm with one seed and one number of labels. It has a folder with checkpoints and a result of its own."""

    folder: Path
    arm: str
    """"pretrained", "scratch", "cnn" or "published"."""
    seed: int
    labels_per_class: int | None

    @property
    def title(self) -> str:
        """What is trained, in words."""
        labels = f"{self.labels_per_class} labels a class, " if self.labels_per_class else ""
        return f"{self.arm}, {labels}seed {self.seed}"


def cells_of(recipe: FinetuneRecipe) -> list[Cell]:
    """Return the cells of a run in their order. A folder is named after the number of labels if there are several."""
    counts = recipe.data.label_counts()
    return [
        Cell(Path(recipe.out) / (f"labels{count}-" * (len(counts) > 1) + f"{arm}-seed{seed}"), arm, seed, count)
        for count in counts
        for seed in recipe.seeds
        for arm in arms_of(recipe)
    ]


def parse_folder(folder: Path) -> tuple[str, int] | None:
    """Return the arm and the seed of a cell by the name of its folder, or of `encoder` in it; None: it is no cell."""
    name = folder.parent.name if folder.name == "encoder" else folder.name
    found = re.fullmatch(r"(?:labels\d+-)?([a-z]+)-seed(\d+)", name)
    return (found[1], int(found[2])) if found else None


class CellResult(NamedTuple):
    """What came of a cell."""

    metrics: dict[str, float]
    """On the validation images."""
    device_minutes: float
    """What its training took; nan where a cell did not keep it."""


def read_result(cell: Path, fingerprint: str) -> CellResult | None:
    """Return what came of a cell that is done, or None.

    Raises:
        UserError: They were measured on other data, or from another encoder.
    """
    try:
        result = json.loads((cell / RESULT).read_text())
        metrics = {k: math.nan if v is None else float(v) for k, v in result["metrics"].items()}
        before = result["fingerprint"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    if before != fingerprint:
        raise UserError(f"{cell}: the data or the encoder changed since; start a new run")
    return CellResult(metrics, _read_minutes(cell))


def _read_minutes(cell: Path) -> float:
    """What training took, as the last checkpoint says: result.json is the same for every run of a recipe."""
    try:
        newest = steps(cell / "checkpoints")[0]
        return float(json.loads((newest / "state.json").read_text())["device_minutes"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return math.nan


def read_unread_classes(cell: Path) -> tuple[str, ...]:
    """Return the classes of whose validation images a finished cell could read none."""
    return tuple(json.loads((cell / RESULT).read_text()).get("unread_classes", ()))
