"""Draw fine-tuning runs after pretraining of several lengths: does it pay to pretrain longer?

    python tools/draw_time_curve.py runs/after-5 runs/after-15 runs/after-45 --out docs/pretraining_time.png

The horizontal axis is the minutes of pretraining and fine-tuning together. The figure has the score of the pretrained
encoder, of the CNN that had the same time, and, as a level, of the same encoder from scratch. Intervals are 95 %, over
seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mpp.drawing.plots import Level, Line, draw
from mpp.runs.verdict import APPROACHES, Estimate, line_of_scores, stored_cost, stored_estimate

Point = tuple[float, Estimate]


def read_points(runs: Sequence[Path]) -> tuple[dict[str, list[Point]], str, str]:
    """Return the (minutes with pretraining, score) of each run by approach, from short to long; the metric; the device.

    Raises:
        ValueError: If a run has several numbers of labels, or its encoder's minutes are not known.
    """
    points: dict[str, list[Point]] = {}
    metric = device = ""
    for run in runs:
        result = json.loads((run / "result.json").read_text())
        if len(result["verdicts"]) > 1:
            raise ValueError(f"{run}: several numbers of labels; give runs of one")
        (verdict,) = result["verdicts"]
        cost = stored_cost(verdict["cost"])
        if cost is None or cost.minutes_before.get("pretrained") is None:
            raise ValueError(f"{run}: what its encoder's pretraining took is not known")
        metric, device = verdict["metric"], cost.device
        for approach, score in verdict["score"].items():
            before = cost.minutes_before.get(approach) or 0.0
            points.setdefault(approach, []).append((before + cost.minutes[approach], stored_estimate(score)))
    return (
        {approach: sorted(of_approach, key=lambda p: p[0]) for approach, of_approach in points.items()},
        metric,
        device,
    )


def draw_curve(runs: Sequence[Path], out: Path) -> None:
    """Draw the figure of runs into a PNG."""
    points, metric, device = read_points(runs)
    shown: list[Line | Level] = []
    for approach, of_approach in points.items():
        if approach == "scratch":  # its time is only that of fine-tuning
            shown.append(
                Level(APPROACHES[approach], sum(100 * score.mean for _, score in of_approach) / len(of_approach))
            )
        else:
            shown.append(line_of_scores(APPROACHES[approach], of_approach, dashed=approach == "cnn"))
    seeds = len(points["pretrained"][0][1].values)
    title = "mean of seeds, 95 % interval" if seeds > 1 else "one seed"
    draw({title: shown}, out, xlabel=f"{device}-minutes, with pretraining", ylabel=f"{metric}, %", log_x=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score over the time of pretraining and fine-tuning together.")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(words)
    draw_curve(given.runs, given.out)
    print(given.out)


if __name__ == "__main__":
    main()
