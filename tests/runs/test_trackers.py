"""TensorBoard, Weights & Biases (offline), Trackio and MLflow get the metrics as they are written, and return them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

import mpp
from mpp.errors import MppWarning, UserError
from mpp.runs.records import read_metrics
from mpp.runs.trackers import Trackers
from tests.conftest import command, pretrain_recipe, pretrain_values


def test_tensorboard(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"trackers": ["tensorboard"], "optim.steps": 10, "checkpoint_every_steps": 4, "keep_checkpoints": 3}
    recipe = pretrain_recipe(shards, tmp_path / "run", **changes)
    mpp.pretrain(recipe)
    plain = pretrain_recipe(shards, tmp_path / "plain", **{**changes, "trackers": []})
    mpp.pretrain(plain)
    losses = [m["loss"] for m in read_metrics(tmp_path / "run")]
    assert losses == [m["loss"] for m in read_metrics(tmp_path / "plain")], "a tracker must not change training"
    events = EventAccumulator(str(tmp_path / "run" / "mpp")).Reload()
    found = {e.step: e.value for e in events.Scalars("loss")}
    assert [found[i + 1] for i in range(10)] == pytest.approx(losses)
    assert "skill" in events.Tags()["scalars"]
    # a run that resumes from step 4 removes its later steps
    mpp.pretrain(recipe, resume=str(tmp_path / "run" / "checkpoints" / "step-00000004"))
    again = EventAccumulator(str(tmp_path / "run" / "mpp")).Reload()
    assert [e.step for e in again.Scalars("loss")] == list(range(1, 11))


@pytest.mark.slow
def test_wandb_offline(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(pretrain_values(shards, tmp_path / "run", **{"trackers": "wandb", "optim.steps": 3}))
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = command("pretrain", path, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    data = kept.read_bytes()
    for word in (
        b"skipped_images",
        b"grad_norm",
        b"encoder.name",
        (tmp_path / "run" / "tracked-as").read_bytes().strip(),
    ):
        assert word in data


def test_trackio(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed: it wants an older Pillow than mpp would choose")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", trackers=["trackio"], **{"optim.steps": 3}))
    with sqlite3.connect(tmp_path / "trackio" / "mpp.db") as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in rows] == [1, 2, 3]


def test_mlflow(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    changes = {
        "trackers": ["mlflow"],
        "mask.ratio": 0.55,
        "optim.steps": 10,
        "checkpoint_every_steps": 4,
        "keep_checkpoints": 3,
    }
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **changes))
    losses = [m["loss"] for m in read_metrics(tmp_path / "run")]
    # a run that continues from step 4, with another number of workers, is the same run of MLflow
    again = pretrain_recipe(shards, tmp_path / "run", **changes, **{"data.workers": 1})
    mpp.pretrain(again, resume=str(tmp_path / "run" / "checkpoints" / "step-00000004"))
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'mpp'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert mlflow.active_run() is None
    assert run.info.run_id == (tmp_path / "run" / "mlflow-run").read_text().strip()
    assert run.info.status == "FINISHED"
    assert run.data.params["mask.ratio"] == "0.55"
    found = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "loss")}
    assert [found[i + 1] for i in range(10)] == pytest.approx(losses)


def test_mlflow_that_fails_does_not_hinder_the_next_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        trackers = Trackers(["mlflow"], tmp_path / name, {"a": 1}, resumed_at=0, active=True)
        with monkeypatch.context() as broken:
            broken.setattr(mlflow, "log_metrics", fail)
            with pytest.warns(MppWarning, match="mlflow gets no more: no network"):
                trackers.log({"step": 1, "loss": 2.0})
        trackers.close()
    assert mlflow.active_run() is None
    (tmp_path / "first" / "mlflow-run").write_text("a" * 32)
    with pytest.raises(UserError, match=rf"trackers: mlflow: .*; delete {tmp_path}/first/mlflow-run to begin another"):
        Trackers(["mlflow"], tmp_path / "first", {"a": 1}, resumed_at=0, active=True)


def test_one_that_is_not_installed_is_said(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackers: wandb is not installed; pip install 'wandb"):
        mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", trackers=["wandb"]))
    assert not (tmp_path / "run").exists(), "the run must be refused before anything is written"
