"""List the runs below a folder, with their results and with the settings in which they differ."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mpp.errors import UserError, printable
from mpp.recipe.flat import JsonObject
from mpp.runs.history import MISSING, History, read_run, settings_that_differ
from mpp.runs.records import RECIPE
from mpp.runs.watch import count_trials, going_on

PARTS = ("checkpoints", "encoder", "reconstructions", "inspect")
"""Folders inside runs that hold no runs of their own."""
ODD = (UserError, TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError, RecursionError)
"""Errors of reading a run whose files were written by hand, or by something else."""
LOW_IS_GOOD = ("loss", "cpu_minutes", "gpu_minutes", "data_wait", "grad_norm", "skipped_images", "ece", "lr")
"""Metrics whose lowest value comes first. Losses of single targets are named loss_TARGET."""
SHOWN = {
    "pretrain": ("skill", "loss", "probe_accuracy"),
    "finetune": ("scratch", "cnn", "published", "gain"),
    "evaluate": ("knn", "linear", "attentive"),
}
"""Metrics in a row of the list, by job, where a run has them. Fine-tunes also show the metric of their task first."""
CHANGED_KEYS = 8
"""Most settings shown under a row (guess)."""


def find_runs(folder: str | Path) -> list[History]:
    """Read all runs below a folder, the newest first. Recipes of users and incomplete folders are left out.

    Raises:
        UserError: If there is no run.
    """
    runs = []
    for path, folders, files in os.walk(folder):
        is_run = RECIPE in files and ("status.json" in files or "env.json" in files)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not (is_run and name in PARTS))
        if is_run:
            with suppress(*ODD):
                run = read_run(path)
                _row(run)  # a run that cannot be shown is left out as well
                runs.append(run)
    if not runs:
        raise UserError(f"{folder}: no run in this folder or below; give the folder that holds run folders")
    return sorted(runs, key=_last_written, reverse=True)


def runs_to_watch(folders: Sequence[str], *, none_is_wrong: bool = True) -> tuple[str, ...]:
    """Replace each folder that only holds runs by its runs in progress.

    Args:
        folders: Folders of runs, or folders that hold such.
        none_is_wrong: Whether it is an error if no run in such a folder is in progress.

    Raises:
        UserError: If none of them is in progress, and that is wrong.
    """
    chosen: list[str] = []
    for folder in folders:
        if (Path(folder) / RECIPE).exists() or (Path(folder) / "metrics.jsonl").exists() or not Path(folder).is_dir():
            chosen.append(folder)  # a run, or something that the command reports as none
            continue
        runs = find_runs(folder)
        going = [str(run.folder) for run in runs if going_on(run, time.time())]
        if not going and none_is_wrong:
            raise UserError(f"{folder}: none of its {len(runs)} runs is in progress; `mpp runs {folder}` lists them")
        chosen += going
    return tuple(chosen)


def rows_of(runs: list[History], sort: str | None = None) -> list[JsonObject]:
    """Return what `mpp runs` shows of each run, as JSON data.

    Args:
        runs: Runs of `find_runs`.
        sort: Metric to sort by, the highest first, but the lowest of losses, times and others for which low is good.
            None keeps the order. Runs without the metric come last.

    Raises:
        UserError: If no run has the metric.
    """
    changed = _changed_settings(runs)
    rows = [_row(run) | {"changed": settings} for run, settings in zip(runs, changed, strict=True)]
    if sort is None:
        return rows
    if known := sorted({name for row in rows for name in row["metrics"]} - {sort}):
        known = [f"these runs have {', '.join(known)}"]
    if not any(sort in row["metrics"] for row in rows):
        raise UserError("; ".join([f"--sort {sort}: no run has this metric", *known]))
    sign = 1 if sort in LOW_IS_GOOD or sort.startswith("loss_") else -1
    return sorted(rows, key=lambda row: sign * row["metrics"][sort] if sort in row["metrics"] else float("inf"))


def _row(run: History) -> JsonObject:
    return {
        "run": str(run.folder),
        "job": run.job,
        "state": str(run.status.get("state", "not begun")),
        "going_on": going_on(run, time.time()),
        "progress": _progress(run),
        "written": _last_written(run),
        "metrics": metrics_of(run),
    }


def metrics_of(run: History) -> dict[str, float]:
    """Return the results of a run by name.

    A pretraining run has the newest value of each metric of metrics.jsonl. A fine-tune has the metrics of the encoder's
    model with the most labels, first that of its task, the score of each baseline by the name of the baseline, and the
    gain over scratch. An evaluation has the accuracy of each probe at its best layer. What was not measured yet is left
    out.
    """
    found: JsonObject = {}
    try:
        if run.job == "pretrain":
            found = {key: value for key, value in run.latest.items() if key not in ("step", "seen")}
        elif run.job == "evaluate":
            found = {probe: score["accuracy"] for probe, score in run.result["best"]["encoder"].items()}
        elif run.result:
            verdict = run.result["verdicts"][-1]
            main, *baselines = verdict["score"]
            found = {verdict["metric"]: verdict["score"][main]["mean"]}
            found |= {name: estimate["mean"] for name, estimate in verdict["metrics"][main].items()}
            found |= {approach: verdict["score"][approach]["mean"] for approach in baselines}
            found |= {"gain": verdict["gain"]["mean"]} if verdict["gain"] else {}
    except ODD:
        pass  # a result of an earlier release, or one that was edited
    return {name: value for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}


def table(rows: list[JsonObject], sort: str | None = None) -> list[str]:
    """Return the lines of `mpp runs`: a line for each run, and one below it with its settings that differ."""
    cells = [
        [row["run"], row["job"], _state(row), row["progress"], _metrics_text(row, sort), _minute(row["written"])]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = []
    for row, line in zip(rows, cells, strict=True):
        cells_of_line = (printable(cell).ljust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join(cells_of_line).rstrip())
        if row["changed"]:
            shown = [f"{key}={value}" for key, value in row["changed"].items()][:CHANGED_KEYS]
            more = len(row["changed"]) - len(shown)
            lines.append("    " + printable(" ".join([*shown, *([f"and {more} more"] if more else [])])))
    return lines


def _changed_settings(runs: list[History]) -> list[dict[str, str]]:
    """Return for each run its values of the settings that differ among the runs of its job."""
    by_job: dict[str, list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        by_job[run.job].append(index)
    changed: list[dict[str, str]] = [{} for _ in runs]
    for indices in by_job.values():
        for key, values in settings_that_differ([runs[index] for index in indices]):
            for index, value in zip(indices, values, strict=True):
                if value != MISSING:
                    changed[index][key] = value
    return changed


def _progress(run: History) -> str:
    if run.job == "finetune":
        done, total = sum(bool(trial.result) for trial in run.trials), count_trials(run)
        return f"{total} models" if done == total else f"{done} of {total} models"
    step, steps = run.step, run.status.get("steps")
    if step is None:
        return ""
    return f"{step:,} steps" if not steps or step == steps else f"{step:,} of {steps:,} steps"


def _state(row: JsonObject) -> str:
    gone = row["state"] == "running" and not row["going_on"]
    return "killed" if gone else str(row["state"])


def _metrics_text(row: JsonObject, sort: str | None) -> str:
    metrics = row["metrics"]
    usual = [*(list(metrics)[:1] if row["job"] == "finetune" else ()), *SHOWN[row["job"]]]
    names = dict.fromkeys([*([sort] if sort else []), *usual])
    percent = () if row["job"] == "pretrain" else usual  # other metrics, by which the user sorts, may be no fractions
    return "  ".join(
        f"{name} " + (f"{100 * metrics[name]:.1f} %" if name in percent else f"{metrics[name]:.4g}")
        for name in names
        if name in metrics
    )


def _last_written(run: History) -> float:
    written = run.status.get("time")
    if isinstance(written, int | float) and 1 < written < 2**33:  # a damaged file may hold any number
        return float(written)
    return (run.folder / RECIPE).stat().st_mtime


def _minute(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
