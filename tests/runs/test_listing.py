"""`mpp runs`, and `mpp watch` of a folder that holds runs."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mpp.cli.app import main
from mpp.errors import UserError
from mpp.runs.history import read_run
from mpp.runs.listing import find_runs, metrics_of, rows_of, runs_to_watch

SHARE = {"mean": 0.5, "half_width": None, "values": [0.5]}


def add_run(folder: Path, *, job: str = "pretrain", written: float, recipe: Any = None, **records: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"job": job, "out": str(folder), **(recipe or {})}))
    status = {"state": "finished", "time": written, "step": 30, "steps": 30, **records.pop("status", {})}
    (folder / "status.json").write_text(json.dumps(status))
    if metrics := records.pop("metrics", None):
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"seen": 8, **m}) + "\n" for m in metrics))
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def some_runs(tmp_path: Path) -> Path:
    """Two pretraining runs, a fine-tune with a baseline, an evaluation inside a run, and files that are no runs."""
    low = {"step": 30, "loss": 0.4, "loss_hog": 0.9, "skill": 0.1, "probe_accuracy": float("nan")}
    add_run(tmp_path / "a", written=100, recipe={"optim": {"steps": 30, "base_lr": 0.1}}, metrics=[low])
    high = {"step": 30, "loss": 0.5, "loss_hog": 0.1, "skill": 0.2}
    add_run(tmp_path / "deep" / "b", written=300, recipe={"optim": {"steps": 30, "base_lr": 0.2}}, metrics=[high])
    best = {"encoder": {"knn": {"accuracy": 0.25}, "linear": {"accuracy": 0.75}}}
    add_run(tmp_path / "a" / "evaluation", job="evaluate", written=200, result={"best": best})
    verdict = {
        "metric": "accuracy", "score": {"pretrained": SHARE, "cnn": {**SHARE, "mean": 0.4}}, "gain": None,
        "metrics": {"pretrained": {"accuracy": SHARE, "auroc": {**SHARE, "mean": 0.9}}},
    }  # fmt: skip
    tuned = {"beside": ["cnn"], "seeds": [0]}
    add_run(tmp_path / "tuned", job="finetune", written=400, recipe=tuned, result={"verdicts": [verdict]})
    for trial in ("pretrained-seed0", "cnn-seed0"):
        (tmp_path / "tuned" / trial).mkdir()
        for name in ("status", "result"):
            (tmp_path / "tuned" / trial / f"{name}.json").write_text('{"state": "finished"}')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("job: pretrain\n")  # a recipe of the user, not a run
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "recipe.yaml").write_text("job: [\n")
    (tmp_path / "broken" / "status.json").write_text("{}")
    return tmp_path


def said(*words: str) -> str:
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code == 0, done.output
    return done.output


def test_every_run_is_listed_with_its_results_the_newest_first(some_runs: Path) -> None:
    lines = said("runs", str(some_runs)).splitlines()
    rows = [line.split() for line in lines if not line.startswith("    ")]
    assert [Path(row[0]).name for row in rows] == ["tuned", "b", "evaluation", "a"]
    assert rows[0][1:5] == ["finetune", "finished", "2", "models"]
    assert " ".join(rows[0][5:-2]) == "accuracy 50.0 % cnn 40.0 %"
    assert " ".join(rows[1][1:-2]) == "pretrain finished 30 steps skill 0.2 loss 0.5"
    assert "knn 25.0 %  linear 75.0 %" in lines[3]
    assert [line.strip() for line in lines if line.startswith("    ")] == ["optim.base_lr=0.2", "optim.base_lr=0.1"]


@pytest.mark.parametrize(
    ("metric", "first"),
    [("skill", "b"), ("loss", "a"), ("loss_hog", "b"), ("auroc", "tuned"), ("linear", "evaluation")],
)
def test_sorted_by_a_metric_the_best_is_first(metric: str, first: str, some_runs: Path) -> None:
    rows = json.loads(said("runs", str(some_runs), "--sort", metric, "--json"))
    assert Path(rows[0]["run"]).name == first
    assert len(rows) == 4
    assert metric in said("runs", str(some_runs), "--sort", metric).splitlines()[0]


def test_what_cannot_be_listed(some_runs: Path) -> None:
    for words, message in (
        (["--sort", "colour"], "--sort colour: no run has this metric; these runs have accuracy, auroc, cnn, knn,"),
        ([], "no run in this folder or below"),
    ):
        folder = some_runs if words else some_runs / "mine"
        done = CliRunner().invoke(main, ["runs", str(folder), *words])
        assert (done.exit_code, message in done.output) == (2, True), done.output


@pytest.mark.parametrize("result", [{}, {"verdicts": []}, {"verdicts": [{"score": 3}]}, {"best": 1}, {"best": []}])
def test_results_that_cannot_be_read_are_left_out(result: Any, tmp_path: Path) -> None:
    for job in ("finetune", "evaluate"):
        assert metrics_of(read_run(add_run(tmp_path / job, job=job, written=1, result=result))) == {}


@pytest.mark.parametrize("time", [float("nan"), 1e300, -1, "yesterday", True, None])
def test_a_damaged_time_is_replaced_by_that_of_the_recipe(time: Any, tmp_path: Path) -> None:
    run = add_run(tmp_path / "run", written=time)
    os.utime(run / "recipe.yaml", (86400, 86400))
    assert "1970-01-0" in said("runs", str(tmp_path))


ODD_RECIPES = (
    "job: finetune\nseeds: 3\n", "job: finetune\nbeside: 3\n", "job: pretrain\n1: 2\n", "job: pretrain\nd: 2024-01-01\n",
    "job: pretrain\nd: 2024-13-41\n", "job: pretrain\nd: " + "[" * 2000 + "\n", 'job: pretrain\nd: "\\e[31mred"\n',
)  # fmt: skip


def test_odd_files_do_not_hide_the_other_runs(some_runs: Path) -> None:
    for i, text in enumerate(ODD_RECIPES):
        odd = some_runs / f"odd{i}"
        odd.mkdir()
        (odd / "recipe.yaml").write_text(text)
        (odd / "status.json").write_text('{"state": "finished"}')
    (some_runs / "encoder").mkdir()  # a folder of the user, whose name is that of a part of runs
    add_run(some_runs / "encoder" / "e", written=1)
    output = said("runs", str(some_runs))
    assert "\x1b" not in output
    shown = {Path(line.split()[0]).name for line in output.splitlines() if not line.startswith("    ")}
    assert {"a", "b", "tuned", "evaluation", "e"} <= shown


def test_a_folder_of_runs_is_watched_by_those_in_progress(some_runs: Path) -> None:
    with pytest.raises(UserError, match="none of its 4 runs is in progress"):
        runs_to_watch([str(some_runs)])
    assert json.loads(said("watch", str(some_runs), "--json")) == []
    alive = {"state": "running", "host": platform.node(), "pid": os.getpid(), "step": 3}
    going = add_run(some_runs / "deep" / "c", written=500, status=alive)
    gone = add_run(some_runs / "deep" / "d", written=500, status={**alive, "pid": 2**22 + 1})
    assert runs_to_watch([str(some_runs), str(gone)]) == (str(going), str(gone))
    assert said("watch", str(some_runs)).startswith(f"{going}: running, step 3 of 30")
    states = {Path(row["run"]).name: row["going_on"] for row in rows_of(find_runs(some_runs))}
    assert (states["c"], states["d"]) == (True, False)
    assert "killed" in next(line for line in said("runs", str(some_runs)).splitlines() if "/d " in line)
