"""Compare the approaches of a fine-tune: scores over seeds with intervals, the gain from pretraining, the best one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mpp.drawing.plots import Line
from mpp.recipe.flat import JsonMapping

T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1 to 30 degrees of freedom (from any table).

For more degrees of freedom the last value is used, which makes intervals a little too wide."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the half-width of its 95 % interval (Student's t). With one seed the half-width is nan."""

    mean: float
    half_width: float
    values: list[float]

    def __str__(self) -> str:
        spread = f" ± {100 * self.half_width:.1f}" if math.isfinite(self.half_width) else ""
        return f"{100 * self.mean:.1f}{spread} %"


def estimate(values: list[float]) -> Estimate:
    """Return the mean and 95 % interval of values from independent seeds."""
    n = len(values)
    if n < 2:
        return Estimate(values[0], math.nan, values)
    t = T_975[min(n - 2, len(T_975) - 1)]
    return Estimate(float(np.mean(values)), float(t * np.std(values, ddof=1) / math.sqrt(n)), values)


APPROACHES = {
    "pretrained": "the pretrained encoder",
    "scratch": "the encoder from scratch",
    "cnn": "the CNN from scratch",
    "published": "the encoder with published weights",
}
"""Name of an approach -> its name in sentences."""


@dataclass(frozen=True)
class Conclusion:
    """What can be concluded from differences over seeds."""

    kind: Literal["helped", "hurt", "best", "not_shown", "one_seed"]
    text: str
    """The conclusion as a clause; the terminal, the report and the model card use the same words."""


SAME = "compared with the same fine-tuning from scratch"
"""What a gain is a gain over."""


def conclude(gain: Estimate) -> Conclusion:
    """Conclude whether pretraining helped.

    Absence of evidence is not evidence of absence: if the interval holds zero, these seeds do not show a gain, no more.
    One seed has no interval.
    """
    seeds = len(gain.values)
    if not math.isfinite(gain.half_width):
        return Conclusion("one_seed", "one seed, so no interval and no conclusion")
    if gain.mean > gain.half_width:
        return Conclusion("helped", f"pretraining helped, {SAME}: the 95 % interval of the gain is above zero")
    if gain.mean < -gain.half_width:
        return Conclusion("hurt", f"pretraining hurt, {SAME}: the 95 % interval of the gain is below zero")
    return Conclusion("not_shown", f"a gain is not shown with {seeds} seeds: its 95 % interval holds zero")


def compare_approaches(score: Mapping[str, Estimate]) -> Conclusion | None:
    """Conclude whether the best approach is ahead of the next one by more than chance, paired by seed.

    Args:
        score: Score of each approach, over the same seeds.

    Returns:
        A conclusion of kind "best", "not_shown" or "one_seed". It is None if there are fewer than two approaches, or
        only "pretrained" and "scratch", which the gain compares already.
    """
    if len(score) < 2 or {*score} == {"pretrained", "scratch"}:
        return None
    best, second = sorted(score, key=lambda approach: -score[approach].mean)[:2]
    ahead = estimate([a - b for a, b in zip(score[best].values, score[second].values, strict=True)])
    points = f"{100 * ahead.mean:.1f} points above {APPROACHES[second]}"
    seeds = len(ahead.values)
    if seeds == 1:
        return Conclusion(
            "one_seed", f"{APPROACHES[best]} is {points} with one seed, which may be chance: it has no interval"
        )
    interval = f"95 % interval {_ends(ahead)}"
    if ahead.mean > ahead.half_width:
        return Conclusion("best", f"best here is {APPROACHES[best]}, {points}: more than chance ({interval})")
    text = f"no approach is shown to be best with {seeds} seeds: {APPROACHES[best]} is {points}, which may be chance"
    return Conclusion("not_shown", f"{text} ({interval})")


def compare_with_start(verdict: Verdict) -> tuple[Estimate, str] | None:
    """Return the score of the linear probe that initialised the pretrained encoder's head, and a remark about it.

    It is None if the head was initialised otherwise.
    """
    start = verdict.metrics.get("pretrained", {}).get(f"start_{verdict.metric}")
    if start is None:
        return None
    worse = start.mean > verdict.score["pretrained"].mean
    return start, "(its start" + ("; fine-tuning lost against it: lower optim.base_lr)" if worse else ")")


def line_of_scores(name: str, points: Sequence[tuple[float, Estimate]], *, dashed: bool = False) -> Line:
    """Return the line of a plot, in percent. It has intervals if every point has one.

    Args:
        name: Name of the line.
        points: Points of the line, (x, score) each.
        dashed: Whether the line is dashed.
    """
    widths = [100 * score.half_width for _, score in points]
    known = all(map(math.isfinite, widths))
    return Line(name, [x for x, _ in points], [100 * e.mean for _, e in points], widths if known else None, dashed)


def name_unread(classes: Sequence[str]) -> str:
    """Return a clause that lists the classes without a readable validation image, in the same words everywhere."""
    return f"data.val: not one image of {', '.join(classes)} could be read; the scores are of the other classes only"


def stored_estimate(value: JsonMapping) -> Estimate:
    """Return an estimate as result.json stores it. A half-width of null or NaN becomes nan."""
    width = value.get("half_width")
    return Estimate(float(value["mean"]), math.nan if width is None else float(width), list(value["values"]))


@dataclass(frozen=True)
class Cost:
    """Training time of the approaches, including measurements and checkpoints on the way."""

    device: str
    """"CPU" or "GPU": the device whose minutes are counted, summed over all processes."""
    minutes_before: dict[str, float | None]
    """Approach -> minutes spent on its encoder and teacher beforehand; None if they were not recorded."""
    minutes: dict[str, float]
    """Approach -> minutes of fine-tuning, mean over the seeds."""

    def text(self, approach: str) -> str:
        """Return the training time of an approach, such as "13.6 + 6.3 CPU-minutes"; "" if it is not known."""
        own = self.minutes.get(approach, math.nan)
        if not math.isfinite(own):
            return ""
        before = self.minutes_before.get(approach)
        return f"{f'{before:.1f} + ' if before else ''}{own:.1f} {self.device}-minutes"


def stored_cost(value: JsonMapping | None) -> Cost | None:
    """Return a cost as result.json stores it; None if the run recorded none."""
    if not value:
        return None
    minutes = {approach: math.nan if m is None else float(m) for approach, m in value["minutes"].items()}
    before = value.get("minutes_before") or {"pretrained": value.get("pretraining_minutes")}  # earlier releases
    return Cost(str(value["device"]), dict(before), minutes)


@dataclass(frozen=True)
class Verdict:
    """Scores of the approaches of a fine-tune, for one number of labels."""

    labels_per_class: int | None
    """Labels per class; None means all labels, or a fraction of them."""
    metric: str
    """The task's main metric: "accuracy", or for example "map" if images have several labels."""
    score: dict[str, Estimate]
    """Approach ("pretrained", "scratch", "cnn", "published") -> main metric on the validation images."""
    metrics: dict[str, dict[str, Estimate]]
    """Approach -> metric -> its estimate, for every metric of the task."""
    gain: Estimate | None
    """pretrained - scratch, paired by seed; None if either of these approaches was not trained."""
    cost: Cost | None = field(default=None, compare=False)
    """Training time; None if it was not recorded. It is not compared, since it differs from run to run."""

    @staticmethod
    def of(
        labels_per_class: int | None,
        trials: Mapping[str, list[dict[str, float]]],
        metric: str = "accuracy",
        cost: Cost | None = None,
    ) -> Verdict:
        """Summarise the trials of one number of labels.

        Args:
            labels_per_class: Labels per class. None means all.
            trials: Metrics of each seed by approach; the seeds are in the same order for each.
            metric: The main metric, by which approaches are compared.
            cost: Training time of the approaches.
        """
        scores = {approach: [m[metric] for m in seeds] for approach, seeds in trials.items()}
        metrics = {
            approach: {name: estimate([m[name] for m in seeds]) for name in seeds[0] if all(name in m for m in seeds)}
            for approach, seeds in trials.items()
        }
        gain = None
        if {"pretrained", "scratch"} <= scores.keys():
            pairs = zip(scores["pretrained"], scores["scratch"], strict=True)
            gain = estimate([a - b for a, b in pairs])
        return Verdict(
            labels_per_class, metric, {approach: estimate(v) for approach, v in scores.items()}, metrics, gain, cost
        )


def aligned(rows: Sequence[Sequence[str]], gap: int = 3) -> list[str]:
    """Return the rows of a table as lines for a terminal, with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [(" " * gap).join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def table(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts as text for the terminal."""
    if len(verdicts) == 1:
        return _one(verdicts[0])
    approaches = list(verdicts[0].score)
    rows = [["labels a class", *approaches, *(["gain"] if verdicts[0].gain else [])]]
    for v in verdicts:
        gain = [_points(v.gain) + _interval(v.gain)] if v.gain else []
        rows.append([str(v.labels_per_class), *(str(e) for e in v.score.values()), *gain])
    lines = aligned(rows)
    for v in verdicts:
        costs = [f"{approach} {text}" for approach in v.score if v.cost and (text := v.cost.text(approach))]
        notes = [", ".join(costs)]
        if begun := compare_with_start(v):
            notes.append(f"probe {begun[0]} {begun[1]}")
        if v.gain and (conclusion := conclude(v.gain)).kind != "helped":
            notes.append(conclusion.text)
        if compared := compare_approaches(v.score):
            notes.append(compared.text)
        lines += [f"{v.labels_per_class} labels a class: {note}" for note in notes if note]
    return "\n".join(lines)


def _one(verdict: Verdict) -> str:
    rows = []
    for approach, e in verdict.score.items():
        cost = verdict.cost.text(approach) if verdict.cost else ""
        rows.append(f"{approach:<12} {e}   (seeds: {_percents(e.values)})" + (f"   {cost}" if cost else ""))
    if begun := compare_with_start(verdict):
        rows.append(f"{'probe':<12} {begun[0]}   {begun[1]}")
    if verdict.gain is not None:
        rows.append(f"{'gain':<12} {_points(verdict.gain)}   {_interval(verdict.gain).strip()}".rstrip())
        rows.append(conclude(verdict.gain).text)
    if compared := compare_approaches(verdict.score):
        rows.append(compared.text)
    return "\n".join(rows)


def _percents(values: list[float]) -> str:
    return ", ".join(f"{100 * v:.1f}" for v in values)


def _points(gain: Estimate) -> str:
    return f"{100 * gain.mean:+.1f} points"


def _interval(gain: Estimate) -> str:
    if not math.isfinite(gain.half_width):
        return ""
    return f" (95 % interval {_ends(gain)})"


def _ends(difference: Estimate) -> str:
    """Return the ends of an interval as text, in percentage points."""
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    return f"{100 * low:+.1f} to {100 * high:+.1f}"
