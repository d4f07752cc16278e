"""Read the records of a run: its recipe, metrics, status and results. Only files are read; no model is loaded."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mpp.errors import UserError
from mpp.recipe.flat import JsonObject, differing, flat_keys
from mpp.runs.records import RECIPE, checkpoints_in, read_metrics

COUNTS = ("step", "steps", "pid")
"""Keys of status.json that hold whole numbers; any other value is ignored."""


@dataclass
class History:
    """The records in a run folder. A missing or incomplete file is represented by an empty value."""

    folder: Path
    job: str
    """pretrain, finetune or evaluate; "trial" for one model of a fine-tune"""
    recipe: JsonObject
    env: JsonObject
    status: JsonObject
    metrics: list[JsonObject]
    result: JsonObject
    data: JsonObject = field(default_factory=dict)
    """Content of data.json: facts about the run's images, such as their numbers"""
    trials: list[History] = field(default_factory=list)
    """Trials of a fine-tune that were begun, in the order in which they ran"""

    @property
    def name(self) -> str:
        return self.folder.name or str(self.folder)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return (steps, values) of a metric, for the lines that have a value."""
        points = [(m["step"], m[key]) for m in self.metrics if isinstance(m.get(key), int | float) and "step" in m]
        return [s for s, _ in points], [float(v) for _, v in points]

    def last(self, key: str) -> float | None:
        """Return the newest value of a metric, or None."""
        values = self.series(key)[1]
        return values[-1] if values else None

    @property
    def latest(self) -> JsonObject:
        """The newest value of every metric, from whichever line has it, since some are measured only now and then."""
        return {key: value for line in self.metrics for key, value in line.items()}

    @property
    def step(self) -> int | None:
        """The step that the run has reached.

        While the run is in progress, its status is that of the last checkpoint, so the metrics may be ahead. After the
        run, the status has its last step.
        """
        stated = self.status.get("step")
        if not self.metrics or (stated is not None and self.status.get("state") != "running"):
            return stated
        return max(stated or 0, self.metrics[-1]["step"])

    def hours(self) -> list[float]:
        """Return the hours of training at each line of the metrics.

        They are computed from images and throughput, so that the time between an interruption and its resumption does
        not count.
        """
        hours, total, seen = [], 0.0, 0
        for m in self.metrics:
            rate = m.get("images_per_s")
            if rate:
                total += (m["seen"] - seen) / rate / 3600
            seen = m["seen"]
            hours.append(total)
        return hours

    def setting(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted key of the recipe, or the default."""
        value: Any = self.recipe
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def images_seen(self) -> int:
        """Return the number of images in all steps so far, those of several passes each time. Views count as one."""
        views = self.setting("agreement.views")
        seen: int = self.metrics[-1]["seen"] if self.metrics else 0
        return seen // views if _whole(views) and views else seen

    def made_with(self) -> Path | None:
        """Return the path of the run or export whose encoder this run reads; None if there is none."""
        source = self.recipe.get("encoder")
        if self.job == "pretrain" or not isinstance(source, str) or source == "scratch":
            return None
        path = Path(source)
        path = path.parent if path.name == "encoder" else path
        # the path is relative to the folder where the job was started, most often a parent of its run folder
        places = (path, *(parent / path for parent in self.folder.absolute().parents))
        return next((place for place in places if place.exists()), path)

    def checkpoint(self) -> Path | None:
        """Return the newest checkpoint, or None. Its checksums are not compared."""
        newest_first = checkpoints_in(self.folder / "checkpoints")
        return newest_first[0] if newest_first else None

    def alive(self) -> bool | None:
        """Return whether the process of a run with state "running" exists; None if this machine cannot tell."""
        if self.status.get("state") != "running" or self.status.get("host") != platform.node():
            return None
        try:
            os.kill(int(self.status["pid"]), 0)
        except ProcessLookupError:
            return False
        except (OSError, KeyError, ValueError):
            return None
        return True


def approaches_of_finetune(recipe: JsonObject) -> list[str]:
    """Return the approaches that the recipe of a fine-tune lists. Earlier releases used the key `beside_scratch`."""
    beside = recipe.get("beside", ["scratch"] if recipe.get("beside_scratch", True) else [])
    beside = [beside] if isinstance(beside, str) else list(beside)
    if recipe.get("encoder") == "scratch":
        return ["scratch", *(approach for approach in beside if approach == "cnn")]
    return ["pretrained", *beside]


INSPECTION, INSPECTION_INDEX = "inspect", "index.json"
"""Folder of a run that holds the views of `mpp inspect`, and the file that lists them."""


def read_inspection(run: Path) -> JsonObject | None:
    """Return the index that `mpp inspect` wrote into a run; None if there is none that can be read."""
    try:
        index = json.loads((run / INSPECTION / INSPECTION_INDEX).read_text())
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) else None


def read_run(folder: str | Path) -> History:
    """Read the records of a run.

    Raises:
        UserError: If the folder is not a run folder.
    """
    path = Path(folder)
    try:
        recipe = yaml.safe_load((path / RECIPE).read_text(encoding="utf-8"))
        job = str(recipe["job"])
        if not isinstance(recipe, dict) or job not in ("pretrain", "finetune", "evaluate"):
            raise TypeError
    except FileNotFoundError as error:
        if (path / "metrics.jsonl").exists() and (path.parent / RECIPE).exists():
            raise UserError(f"{path}: is one model of the fine-tune {path.parent}; give that folder") from error
        raise UserError(f"{path}: not a run folder (no {RECIPE})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path / RECIPE}: not the recipe of a run") from error
    history = _history(path, job, recipe)
    if job == "finetune":
        parts = [p for p in path.iterdir() if p.is_dir() and (p / "status.json").exists()]
        in_order = sorted(parts, key=lambda p: (p / "train.log").stat().st_mtime if (p / "train.log").exists() else 0)
        history.trials = [_history(p, "trial", recipe) for p in in_order]
    return history


def _history(path: Path, job: str, recipe: JsonObject) -> History:
    files = {name: _json(path / f"{name}.json") for name in ("env", "status", "result", "data")}
    status = {k: v for k, v in files["status"].items() if k not in COUNTS or _whole(v)}
    metrics = [
        {k: v for k, v in m.items() if v is None or (isinstance(v, int | float) and not isinstance(v, bool))}
        for m in read_metrics(path)
        if _whole(m.get("step")) and _whole(m.get("seen"))
    ]
    return History(path, job, recipe, files["env"], status, metrics, files["result"], files["data"])


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _json(path: Path) -> JsonObject:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


MISSING = "–"
"""Stands for the value of a key that a recipe does not have."""


def settings_that_differ(runs: list[History]) -> list[tuple[str, list[str]]]:
    """Return (dotted key, its value in each run) for each key whose values differ. `out` and presets are left out."""
    flat = [flat_keys(run.recipe) for run in runs]
    aside = ("out", "presets", "scales")  # presets are already applied to a run's recipe
    return [(key, [_shown(f.get(key)) for f in flat]) for key in differing(flat) if key not in aside]


def _shown(value: object) -> str:
    return (
        MISSING
        if value is None
        else json.dumps(value, ensure_ascii=False, default=str)
        if not isinstance(value, str)
        else value
    )
