"""Report the progress of a run from its files, so that it can be watched from another terminal or machine."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from pathlib import Path

from mpp.recipe.flat import JsonObject
from mpp.runs.history import History, approaches_of_finetune, read_run
from mpp.runs.log import RECENT_LINES, format_duration
from mpp.runs.records import RECIPE
from mpp.runs.symptoms import symptoms

QUIET = 10
"""A run counts as silent if it has written nothing for this many times the usual time between two lines."""
YOUNG_S = 600
"""Seconds for which a run folder without a status counts as a run that is starting (guess)."""


def standing(folder: str | Path, now: float | None = None) -> tuple[str, bool]:
    """Return a text about the progress of a run, and whether it is still in progress.

    Args:
        folder: Folder of the run.
        now: Current time in seconds since 1970. None means the time of the call.

    Raises:
        UserError: If the folder is not a run folder.
    """
    run = read_run(folder)
    now = time.time() if now is None else now
    if run.job == "finetune":
        lines, going = _finetune(run, now)
    else:
        lines, going = _trained(run, now)
    lines += [f"  warning: {s.text} {s.advice}" for s in symptoms(run)]
    return "\n".join(lines), going


def record(folder: str | Path, now: float | None = None) -> JsonObject:
    """Return the progress of a run as JSON data, for scripts.

    It includes the newest value of each metric, the warnings, and the trials of a fine-tune.

    Args:
        folder: Folder of the run.
        now: Current time in seconds since 1970. None means the time of the call.

    Raises:
        UserError: If the folder is not a run folder.
    """
    run = read_run(folder)
    now = time.time() if now is None else now
    shown = _record(run, now)
    if run.job == "finetune":
        shown |= {"trials": [_record(trial, now) for trial in run.trials], "trials_total": count_trials(run)}
    warnings = [dataclasses.asdict(symptom) for symptom in symptoms(run)]
    return shown | {"warnings": warnings}


def _record(run: History, now: float) -> JsonObject:
    going, checkpoint = going_on(run, now), run.checkpoint()
    return {
        "run": str(run.folder),
        "job": run.job,
        "state": run.status.get("state", "not begun"),
        "going_on": going,
        "step": run.step,
        "steps": run.status.get("steps"),
        "seconds_left": _seconds_left(run, now) if going else None,
        "silent_s": _silent_for(run, now) if going else None,
        "metrics": run.latest,
        "checkpoint": str(checkpoint) if checkpoint else None,
    }


def _trained(run: History, now: float) -> tuple[list[str], bool]:
    """Return lines about a pretraining run, a trial or an evaluation, and whether it is in progress."""
    state = str(run.status.get("state", "not begun"))
    running = going_on(run, now)
    step, steps = run.step, run.status.get("steps")
    head = f"{run.folder}: {state}"
    if step is not None and steps:
        head += f", step {step:,} of {steps:,} ({step / steps:.0%})"
    if running and (left := _seconds_left(run, now)) is not None:
        head += f", about {format_duration(left)} left"
    lines = [head]
    shown = [
        f"{word} {value:.4g}"
        for word, key in (
            ("loss", "loss"),
            ("skill", "skill"),
            ("probe", "probe_accuracy"),
            ("images/s", "images_per_s"),
        )
        if (value := run.last(key)) is not None
    ]
    if (wait := run.last("data_wait")) is not None:
        shown.append(f"data wait {wait:.0%}")
    if shown:
        lines.append("  " + "  ".join(shown))
    if checkpoint := run.checkpoint():
        age = format_duration(max(now - checkpoint.stat().st_mtime, 0))
        lines.append(f"  last checkpoint: step {int(checkpoint.name.removeprefix('step-')):,}, {age} ago")
    if running and (quiet := _silent_for(run, now)) is not None:
        lines.append(f"  nothing written for {format_duration(quiet)}: it may hang, or be gone")
    return lines, running


def _finetune(run: History, now: float) -> tuple[list[str], bool]:
    state = str(run.status.get("state", "not begun"))
    done = sum(bool(trial.result) for trial in run.trials)
    lines = [f"{run.folder}: {state}, {done} of {count_trials(run)} models done"]
    for trial in run.trials:
        if not trial.result:
            lines += ["  " + line for line in _trained(trial, now)[0]]
    return lines, going_on(run, now)


def count_trials(run: History) -> int:
    """Return the number of models that a fine-tune trains."""
    counts = run.setting("data.labels_per_class") or [None]
    approaches = len(approaches_of_finetune(run.recipe))
    return len(run.recipe.get("seeds", [0])) * len(counts if isinstance(counts, list) else [counts]) * approaches


def going_on(run: History, now: float) -> bool:
    """Return whether a run is in progress, or was started just now and has not written its status yet."""
    if not run.status:  # a trial has a status from its beginning, so it cannot be read
        return run.job != "trial" and now - (run.folder / RECIPE).stat().st_mtime < YOUNG_S
    return run.status.get("state") == "running" and run.alive() is not False


def _pace(run: History, *, begun: bool = False) -> float | None:
    """Return the mean seconds per step over the last few lines, or None.

    Args:
        run: The run.
        begun: Whether a single line is enough, although its time includes the start-up.
    """
    lines = run.metrics[-RECENT_LINES - 1 :]
    if begun and len(lines) == 1:
        lines = [{"step": 0, "seen": 0}, *lines]
    seconds = steps = 0.0
    for before, line in itertools.pairwise(lines):
        if line.get("images_per_s"):
            seconds += (line["seen"] - before["seen"]) / line["images_per_s"]
            steps += line["step"] - before["step"]
    return seconds / steps if steps > 0 else None


def _since_last_line(run: History, now: float) -> float:
    return max(now - (run.folder / "metrics.jsonl").stat().st_mtime, 0)


def _seconds_left(run: History, now: float) -> float | None:
    pace = _pace(run)
    if pace is None or not run.status.get("steps"):
        return None
    return max((run.status["steps"] - run.metrics[-1]["step"]) * pace - _since_last_line(run, now), 0)


def _silent_for(run: History, now: float) -> float | None:
    """Return the seconds since the last line if they are far more than usual; else None. None after the last step."""
    pace, every = _pace(run, begun=True), run.setting("log_every_steps", 50)
    if pace is None or not isinstance(every, int) or run.metrics[-1]["step"] >= run.status.get("steps", math.inf):
        return None
    since = _since_last_line(run, now)
    return since if since > max(QUIET * every * pace, 60) else None
