"""Build the parts of a report that compares runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mpp.drawing import plots
from mpp.drawing.plots import Line
from mpp.recipe.flat import JsonObject
from mpp.reporting.parts import (
    Part,
    Table,
    duration,
    estimate_text,
    number_text,
    percent_text,
    short_number,
    state_of_run,
)
from mpp.reporting.pictures import Pictures
from mpp.runs.history import History, settings_that_differ


def side_by_side(runs: list[History], parts_of: dict[Path, list[History]]) -> Part:
    names = names_of_runs(runs)
    table = Part("compare", "Side by side")
    rows = [["state", *(state_of_run(r) for r in runs)]]
    for label, value in (
        ("skill", lambda r: short_number(r.last("skill"))),
        ("loss", lambda r: short_number(r.last("loss"))),
        ("linear probe", lambda r: percent_text(r.last("probe_accuracy"))),
        ("effective rank of the features", lambda r: short_number(r.last("feature_rank"))),
        ("images seen", lambda r: f"{r.images_seen():,}" if r.metrics else "–"),
        ("training", lambda r: duration(r.hours()[-1]) if r.metrics else "–"),
        ("images a second", lambda r: short_number(r.last("images_per_s"))),
    ):
        of_run: Callable[[History], str] = value
        cells = [of_run(r) for r in runs]
        if any(c != "–" for c in cells):
            rows.append([label, *cells])
    metrics: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        for other in parts_of[run.folder]:
            for key, shown in headline_parts(other):
                metrics.setdefault(key, ["–"] * len(runs))[i] = shown
    rows += [[key, *cells] for key, cells in metrics.items()]
    table.tables.append(Table(["", *names], rows))
    return table


def keys_that_differ(runs: list[History]) -> Part:
    names = names_of_runs(runs)
    changed = settings_that_differ(runs)
    keys = Part("keys", "Recipe keys that differ")
    if changed:
        keys.tables.append(Table(["key", *names], [[key, *values] for key, values in changed]))
    else:
        keys.text.append("None: the recipes are the same.")
    return keys


def curves_of_all(runs: list[History], pictures: Pictures) -> Part:
    names = names_of_runs(runs)
    curves = Part(
        "curves", "Curves", ["Over steps, images and hours of training: which is fair depends on what costs."]
    )
    for key, title in (("loss", "Loss"), ("skill", "Skill"), ("probe_accuracy", "Linear probe, accuracy")):
        for axis in ("step", "images", "hours"):
            lines: list[Line] = []
            for name, run in zip(names, runs, strict=True):
                points = [
                    (points_along(axis, m, h), m[key])
                    for m, h in zip(run.metrics, run.hours(), strict=True)
                    if number_text(m.get(key))
                ]
                if points:
                    later = len(lines) >= len(plots.COLOURS)  # the colours are used again, dashed
                    lines.append(Line(name, [x for x, _ in points], [y for _, y in points], dashed=later))
            if len(lines) > 1:
                alt = "; ".join(f"{line.name} {short_number(line.y[-1])} at last" for line in lines)
                figure = plots.lines({f"{title} over {axis}": lines}, xlabel=axis, width=3.6, height=2.5)
                curves.pictures.append(pictures.plot(figure, f"{title} over {axis}: {alt}."))
    return curves


def points_along(axis: str, m: JsonObject, hours: float) -> float:
    return {"step": float(m["step"]), "images": float(m["seen"]), "hours": hours}[axis]


def headline_parts(run: History) -> list[tuple[str, str]]:
    """Return the main results of a fine-tune or an evaluation, as (label, text) for rows of a table."""
    if run.job == "evaluate":
        best = run.result.get("best", {}).get("encoder", {})
        return [(f"{probe} probe", percent_text(s["accuracy"])) for probe, s in best.items()]
    parts = []
    for v in run.result.get("verdicts", []):
        labels = f", {v['labels_per_class']} labels a class" if v.get("labels_per_class") else ""
        parts += [(f"fine-tuned{labels}", estimate_text(v["score"].get("pretrained")))]
        parts += [(f"gain over scratch{labels}", estimate_text(v.get("gain"), points=True))]
    return parts


def names_of_runs(runs: Sequence[History]) -> list[str]:
    """Return the folder name of each run with its parent folder, or with more if the names would not differ."""
    for depth in range(2, 6):
        names = ["/".join(run.folder.absolute().parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]
