"""Count the minutes of training before a run: its encoder, its teachers, and the runs they started from."""

from __future__ import annotations

import json
import math
from pathlib import Path

from mpp.errors import UserError
from mpp.finetuning.trial import parse_folder
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import load_any
from mpp.recipe.pretrain import PretrainRecipe
from mpp.runs.records import encoder_folder, read_metrics


def minutes_before(recipe: FinetuneRecipe, approach: str, device: str) -> float | None:
    """Return the minutes of training before an approach. Each earlier run counts once.

    Args:
        recipe: Recipe of the run.
        approach: Approach of the run.
        device: Kind of device, "CPU" or "GPU".

    Returns:
        Minutes of that kind of device, 0 if training starts from scratch. None for published weights, or if a folder
        lacks its minutes or was trained on another kind of device.
    """
    if approach == "published":
        return None
    minutes: dict[Path, float] = {}
    for source in _begun_with(recipe, approach):
        _count(source, f"{device.lower()}_minutes", minutes)
    total = sum(minutes.values())
    return total if math.isfinite(total) else None


def _begun_with(recipe: FinetuneRecipe, approach: str) -> list[str]:
    """Return the sources of the encoder and the teachers of an approach, as given in the recipe."""
    encoder = [recipe.encoder] if approach == "pretrained" and recipe.encoder != "scratch" else []
    return encoder + ([*recipe.distill.teacher] if recipe.distill and approach != "cnn" else [])


def _count(source: str, key: str, minutes: dict[Path, float]) -> None:
    """Add the minutes of a run, and of the runs that it started from, to `minutes`; nan if they are not recorded."""
    folder = _run_of(source)
    if folder in minutes:
        return
    minutes[folder] = math.nan
    try:
        if not (folder / "metrics.jsonl").is_file():  # an export, which records only the minutes of its own training
            minutes[folder] = float(json.loads((encoder_folder(source) / "export.json").read_text())["metrics"][key])
            return
        minutes[folder] = float([record[key] for record in read_metrics(folder) if key in record][-1])
        is_trial = not (folder / "recipe.yaml").is_file()
        recipe = load_any((folder.parent if is_trial else folder) / "recipe.yaml")
    except (UserError, OSError, ValueError, KeyError, IndexError, TypeError):
        return
    began: list[str] = []
    if isinstance(recipe, FinetuneRecipe) and (trial := parse_folder(folder)):
        began = _begun_with(recipe, approach=trial.approach)
    elif isinstance(recipe, PretrainRecipe) and (_run_of(recipe.encoder.name) / "metrics.jsonl").is_file():
        began = [recipe.encoder.name]  # the run started from another run; exports and published weights do not count
    for earlier in began:
        _count(earlier, key, minutes)


def _run_of(source: str) -> Path:
    """Return the folder of a run or trial, which may be given by its `encoder` folder. Other folders are returned."""
    folder = Path(source).resolve()
    is_inside = folder.name == "encoder" and (folder.parent / "metrics.jsonl").is_file()
    return folder.parent if is_inside else folder
