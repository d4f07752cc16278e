"""What was trained before a run, in minutes: its encoder, the teacher of `distill`, and what these began with."""

from __future__ import annotations

import json
import math
from pathlib import Path

from mpp.encoders.sources import is_timm_name
from mpp.errors import UserError
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import load_recipe
from mpp.runs.records import encoder_folder, read_metrics


def minutes_before(recipe: FinetuneRecipe, arm: str, device: str) -> float | None:
    """Return what was trained before an arm, each run counted once.

    Args:
        recipe: Of the run.
        arm: One of its arms.
        device: "CPU" or "GPU".

    Returns:
        Minutes of that kind of device; 0 from scratch; None where a folder does not tell, or what it holds was trained
        on another kind of device.
    """
    minutes: dict[Path, float] = {}
    _collect(_begun_with(recipe, arm), f"{device.lower()}_minutes", minutes)
    total = sum(minutes.values())
    return total if math.isfinite(total) else None


def _begun_with(recipe: FinetuneRecipe, arm: str) -> list[str]:
    """The encoder and the teacher of an arm, as its recipe names them."""
    encoder = [recipe.encoder] if arm == "pretrained" else []
    return encoder + ([recipe.distill.teacher] if recipe.distill and arm != "cnn" else [])


def _collect(sources: list[str], key: str, minutes: dict[Path, float]) -> None:
    """Note the minutes of folders, and of what they began with; nan where one does not tell."""
    for source in sources:
        path = Path(source).resolve()
        if path in minutes or source == "scratch":
            continue
        minutes[path] = math.nan
        if is_timm_name(source):
            continue
        try:
            if (path.parent / "recipe.yaml").is_file():  # a fine-tuned cell
                minutes[path] = float(read_metrics(path)[-1][key])
                arm = path.name.split("-seed")[0].rsplit("-", 1)[-1]
                _collect(_begun_with(load_recipe(path.parent / "recipe.yaml", FinetuneRecipe), arm), key, minutes)
            else:
                export = json.loads((encoder_folder(source) / "export.json").read_text())
                minutes[path] = float(export["metrics"][key])
        except (UserError, OSError, ValueError, KeyError, IndexError, TypeError):
            continue
