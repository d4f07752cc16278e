"""recipes/RESULTS.csv: the tool writes the results of trials, and the file has what recipes/LOG.md reports."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mpp.runs.records import write_json
from mpp.runs.verdict import Cost, Verdict
from tests.conftest import ROOT, tool


def run_of(folder: Path, trials: dict[str, float], counts: list[int] | None) -> Path:
    for name, value in trials.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "result.json").write_text(json.dumps({"metrics": {"accuracy": value, "ece": 0.1}}))
    values = {"task": {"name": "classify"}, "data": {"labels_per_class": counts}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    (folder / "result.json").write_text(json.dumps({"metric": "accuracy"}))
    return folder


def test_rows_of_a_run_replace_those_before(tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    several = run_of(tmp_path / "a", {"labels50-scratch-seed1": 0.3, "labels10-pretrained-seed0": 0.25}, [10, 50])
    one = run_of(tmp_path / "b", {"cnn-seed2": 0.123456}, None)
    assert tool("results").write([("x", several), ("y", one)], out) == 3
    (several / "labels50-scratch-seed1" / "result.json").write_text(json.dumps({"metrics": {"accuracy": 0.5}}))
    assert tool("results").write([("x", several)], out) == 2
    with open(out) as file:
        rows = list(csv.reader(file))
    assert rows[1:] == [
        ["y", "classify", "all", "cnn", "2", "accuracy", "0.1235"],
        ["x", "classify", "10", "pretrained", "0", "accuracy", "0.2500"],
        ["x", "classify", "50", "scratch", "1", "accuracy", "0.5000"],
    ]
    (several / "labels50-scratch-seed1" / "result.json").unlink()
    with pytest.raises(ValueError, match="not finished"):
        tool("results").write([("x", several)], out)


def test_the_file_has_both_approaches_of_every_seed() -> None:
    with open(ROOT / "recipes" / "RESULTS.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] != "bench"]
    trials = {(r["run"], r["labels_per_class"], r["approach"], r["seed"]): float(r["value"]) for r in rows}
    assert len(trials) == len(rows), "each trial must be there once"
    assert all(0 <= value <= 1 for value in trials.values())
    for run, labels, approach, seed in trials:
        assert (run, labels, "pretrained" if approach == "scratch" else "scratch", seed) in trials


def finetuned(out: Path, before_minutes: float | None, pretrained: list[float]) -> Path:
    """Write the result.json of a fine-tuning run, as the verdict does."""
    trials = {
        "pretrained": [{"accuracy": v} for v in pretrained],
        "scratch": [{"accuracy": 0.5} for _ in pretrained],
        "cnn": [{"accuracy": 0.6} for _ in pretrained],
    }
    minutes = {"pretrained": 5.0, "scratch": 4.0, "cnn": (before_minutes or 0) + 5}
    before = {"pretrained": before_minutes, "scratch": 0.0, "cnn": 0.0}
    verdict = Verdict.of(100, trials, cost=Cost("CPU", before, minutes))
    write_json(out / "result.json", {"verdicts": [asdict(verdict)]})
    return out


def test_the_curve_over_time_has_pretraining_in_it(tmp_path: Path) -> None:
    for name in ("long", "short", "unknown"):
        (tmp_path / name).mkdir()
    runs = [finetuned(tmp_path / "long", 45.0, [0.7, 0.72]), finetuned(tmp_path / "short", 15.0, [0.61, 0.65])]
    module = tool("draw_time_curve")
    points, metric, device = module.read_points(runs)
    assert (metric, device) == ("accuracy", "CPU")
    assert [(x, round(e.mean, 3)) for x, e in points["pretrained"]] == [(20.0, 0.63), (50.0, 0.71)]
    assert [x for x, _ in points["cnn"]] == [20.0, 50.0]
    assert [x for x, _ in points["scratch"]] == [4.0, 4.0]
    module.main([*map(str, runs), "--out", str(tmp_path / "curve.png")])
    assert Image.open(tmp_path / "curve.png").size[0] > 100
    with pytest.raises(ValueError, match="is not known"):
        module.read_points([finetuned(tmp_path / "unknown", None, [0.6])])
