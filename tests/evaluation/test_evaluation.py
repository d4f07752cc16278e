"""Evaluation end to end: approaches, choices without the validation images, resuming, wrong inputs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mpp
from mpp.data.labeled import open_labeled
from mpp.data.subsets import split
from mpp.errors import UserError
from mpp.evaluation.probes import attentive
from mpp.evaluation.result import EvaluateResult, Score
from mpp.evaluation.run import _open
from tests.conftest import ROOT, command, pretrain_recipe


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    mpp.pretrain(pretrain_recipe(shards, out))
    return out


def keys(shards: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data.train": [str(shards / f"shard-{i:06d}.tar") for i in (1, 2)],
        "data.val": str(shards / "shard-000000.tar"),
        "data.workers": 0,
        "attentive.epochs": 2,
        "attentive.lr": [1e-2],
        "knn.k": [1, 3],
        "linear.weight_decay": [1e-2, 1.0],
        **changes,
    }


def test_all_arms(shards: Path, run: Path, tmp_path: Path) -> None:
    result = mpp.evaluate(run, out=str(tmp_path / "e"), compare=str(run), **keys(shards))
    assert list(result.scores) == ["encoder", "compare", "random", "pixels"]
    assert result.scores["encoder"] == result.scores["compare"], (
        "the same weights, read in the same way, must score the same"
    )
    assert result.scores["encoder"] != result.scores["random"]
    places = {(s.probe, str(s.place)) for s in result.scores["encoder"]}
    read = {f"layer {i}, {pool}" for i in (1, 2) for pool in ("mean", "token")} | {"out"}
    assert places == {(probe, place) for probe in ("knn", "linear") for place in read} | {
        ("attentive", "layer 1, attention"), ("attentive", "layer 2, attention"),
    }  # fmt: skip
    assert {(s.probe, s.layer) for s in result.scores["pixels"]} == {("knn", "pixels"), ("linear", "pixels")}
    stored = json.loads((tmp_path / "e" / "result.json").read_text())
    assert stored["best"]["encoder"]["linear"]["accuracy"] == result.best("encoder", "linear").accuracy  # type: ignore[union-attr]
    assert (stored["train_images"], stored["val_images"]) == (35, 25)
    assert result.chance == pytest.approx(max(np.bincount([0, 1])) / 2, abs=0.2)
    with Image.open(result.plot) as plot:
        assert plot.width > 900, "the plot must have three panels"
    assert not list((tmp_path / "e").rglob("*.npy"))
    for line in ("raw pixels", "the same, at random initialisation", "the most frequent class"):
        assert line in result.table()


def test_one_that_came_to_nothing_leaves_its_folder_to_the_next(
    shards: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails before its first result leaves features behind. The corrected command can use its folder."""

    def fails(*_: Any) -> None:
        raise UserError("a fault that is found late")

    brief: dict[str, Any] = {"out": str(tmp_path / "e"), "probes": ["knn"], "controls": False}
    with monkeypatch.context() as patched:
        patched.setattr("mpp.evaluation.arm._knn", fails)
        with pytest.raises(UserError, match="found late"):
            mpp.evaluate(run, **brief, **keys(shards))
    assert list((tmp_path / "e").rglob("*.npy"))
    assert mpp.evaluate(run, **brief, **keys(shards, **{"knn.k": [1]})).scores
    with pytest.raises(UserError, match="is not empty"):
        mpp.evaluate(run, **brief, **keys(shards))


def test_the_features_kept_are_those_probed(shards: Path, run: Path, tmp_path: Path) -> None:
    """Given the same files, scikit-learn finds the same accuracy."""
    from sklearn.neighbors import KNeighborsClassifier

    out = tmp_path / "e"
    changes = {"keep_features": True, "probes": "knn", "controls": False, "layers": [2]}
    result = mpp.evaluate(run, out=str(out), **keys(shards, **changes))
    assert list(result.scores) == ["encoder"]
    files = out / "arms" / "encoder" / "features"
    x, val = (np.load(files / part / "2-mean.npy") for part in ("train", "val"))
    data = _open(_checked(run, out, shards, **changes))
    labels = data.train.labels[np.concatenate([data.fit, data.tune])]
    score = next(s for s in result.scores["encoder"] if s.place == ("2", "mean"))
    theirs = KNeighborsClassifier(int(score.chosen), metric="cosine").fit(x, labels)
    assert theirs.score(val, data.val.labels) == pytest.approx(score.accuracy)
    first = len(data.fit)
    theirs = KNeighborsClassifier(int(score.chosen), metric="cosine").fit(x[:first], labels[:first])
    assert theirs.score(x[first:], labels[first:]) == pytest.approx(score.tune_accuracy)


def _checked(encoder: Path, out: Path, shards: Path, **changes: Any) -> Any:
    from mpp.recipe.evaluate import EvaluateRecipe
    from mpp.recipe.loading import checked

    return checked(
        {"job": "evaluate"}, EvaluateRecipe, {"encoder": encoder, "out": str(out), **keys(shards, **changes)}
    )


def test_again_the_same(shards: Path, run: Path, tmp_path: Path) -> None:
    first, second = (mpp.evaluate(run, out=str(tmp_path / name), **keys(shards)) for name in "ab")
    assert first.scores == second.scores


def test_arms_that_are_done_are_kept(shards: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    whole = mpp.evaluate(run, out=str(out), **keys(shards))
    stored = out / "arms" / "encoder" / "result.json"
    marked = json.loads(stored.read_text())
    marked["scores"][0]["accuracy"] = 0.123
    stored.write_text(json.dumps(marked))
    shutil.rmtree(out / "arms" / "random")
    (out / "arms" / "random" / "features").mkdir(parents=True)  # killed while it read features
    (out / "arms" / "random" / "features" / "half.npy").write_bytes(b"half")
    with pytest.raises(UserError, match="is not empty; continue its run with --resume auto"):
        mpp.evaluate(run, out=str(out), **keys(shards))
    again = mpp.evaluate(run, out=str(out), resume="auto", **keys(shards))
    assert again.scores["encoder"][0].accuracy == 0.123, "a finished approach must not be evaluated again"
    assert again.scores["random"] == whole.scores["random"]
    with pytest.raises(UserError, match="knn.k: was"):
        mpp.evaluate(run, out=str(out), resume="auto", **keys(shards, **{"knn.k": [2]}))


@pytest.mark.slow
def test_where_it_stands_is_said(
    shards: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stands() -> str:
        return str(json.loads((tmp_path / "e" / "status.json").read_text())["state"])

    def breaks(*given: Any) -> list[Score]:
        assert stands() == "running"
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr("mpp.evaluation.run.run_arm", breaks)
        with pytest.raises(RuntimeError):
            mpp.evaluate(run, out=str(tmp_path / "e"), **keys(shards, probes="knn"))
    assert stands() == "failed"
    capsys.readouterr()
    mpp.evaluate(run, out=str(tmp_path / "e"), resume="auto", **keys(shards, probes="knn"))
    assert stands() == "finished"
    assert capsys.readouterr().out.splitlines()[0] == "part 1 of 3: encoder"


LONG: dict[str, Any] = {"probes": "attentive", "attentive.epochs": 2000, "controls": False}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)])
def test_a_signal_ends_it_as_training(number: signal.Signals, shards: Path, run: Path, tmp_path: Path) -> None:
    """A signal ends an evaluation as it ends training, also a SIGINT that a shell makes background jobs ignore.

    Meanwhile the evaluation prints its progress.
    """
    words = [f"{key}={value}" for key, value in keys(shards, **LONG).items() if key not in ("data.train", "knn.k")]
    words = [w for w in words if "weight_decay" not in w and "lr=" not in w]
    process = subprocess.Popen(
        [sys.executable, "-c", "import mpp.runs.loop_progress as p; p.LINE_EVERY_S = 0.2; from mpp.cli import main; main()",
         "evaluate", str(run), f"data.train={shards / 'shard-000001.tar'}", *words, f"out={tmp_path / 'e'}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    while not lines[-1].startswith("encoder: attentive") and lines[-1]:
        lines.append(process.stdout.readline())
    assert re.fullmatch(r"encoder: attentive.*, epoch \d+ of 2000(, .* left)?, batch \d+ of \d+\n", lines[-1]), lines
    assert json.loads((tmp_path / "e" / "status.json").read_text())["arm"] == "encoder"
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "--resume auto keeps what is finished" in said
    ended = json.loads((tmp_path / "e" / "status.json").read_text())
    assert (ended["state"], ended["why"]) == ("stopped", number.name)


def test_the_linear_probe_says_that_it_is_not_the_papers(shards: Path, run: Path, tmp_path: Path) -> None:
    found = mpp.evaluate(run, out=str(tmp_path / "e"), **keys(shards, probes=["linear"], controls=False))
    assert "not comparable with the linear probes of papers" in found.table()
    assert "not comparable with the linear probes of papers" in mpp.report([tmp_path / "e"]).read_text()
    only = mpp.evaluate(run, out=str(tmp_path / "k"), **keys(shards, probes=["knn"], controls=False))
    assert "linear" not in only.table()


def test_arms_of_other_weights_are_not_kept(shards: Path, run: Path, tmp_path: Path) -> None:
    copy, out = tmp_path / "encoder", tmp_path / "e"
    shutil.copytree(run / "encoder", copy)
    changes = keys(shards, controls=False, probes="knn")
    mpp.evaluate(copy, out=str(out), **changes)
    stored = out / "arms" / "encoder" / "result.json"
    marked = json.loads(stored.read_text())
    stored.write_text(json.dumps({**marked, "fingerprint": "another"}))
    with pytest.raises(UserError, match="the data or the encoder changed since"):
        mpp.evaluate(copy, out=str(out), resume="auto", **changes)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(0, 3))
def test_the_split_is_stratified(labels: list[int], fraction: float, seed: int) -> None:
    values = np.array(labels)
    fit, tune = split(values, fraction, seed)
    assert sorted([*fit, *tune]) == list(range(len(labels)))
    for label in set(labels):
        members = np.count_nonzero(values == label)
        inside = np.count_nonzero(values[fit] == label)
        assert inside >= 1, "every class must be in the part that is fitted"
        if members > 1:
            assert np.count_nonzero(values[tune] == label) >= 1
    assert np.array_equal(split(values, fraction, seed)[1], tune)


def test_nothing_is_chosen_by_the_validation_images() -> None:
    """The best place is that of the tune part, even if another is better on the validation images."""
    a = Score("knn", "1", "mean", 0.5, 0.9, 5, {})
    b = Score("knn", "2", "mean", 0.8, 0.7, 5, {})
    control = Score("knn", "pixels", "own", 0.5, 0.5, 5, {})
    result = EvaluateResult(Path(), {"encoder": [a, b], "pixels": [control]}, 0.1, Path(), 500)
    assert result.best("encoder", "knn") == a
    assert "knn: the encoder's features are no better than raw pixels here" in result.table()
    assert result.best("encoder", "linear") is None
    assert "held-out" not in result.table()
    assert "were chosen by 40 held-out training images" in replace(result, chosen_by=40).table()


def test_choices_do_not_depend_on_the_validation_labels(
    shards: Path, run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """If the labels of the validation images are swapped, accuracies change but no choice does."""
    changes = keys(shards, **{"attentive.lr": [1e-3, 3e-2], "attentive.epochs": 3})
    straight = mpp.evaluate(run, out=str(tmp_path / "a"), **changes)
    real = open_labeled

    def shuffled(spec: Any, *, key: str, **rest: Any) -> Any:
        found = real(spec, key=key, **rest)
        return dataclasses.replace(found, labels=1 - found.labels) if key == "data.val" else found

    monkeypatch.setattr("mpp.evaluation.run.open_labeled", shuffled)
    turned = mpp.evaluate(run, out=str(tmp_path / "b"), **changes)
    for arm, scores in straight.scores.items():
        for a, b in zip(scores, turned.scores[arm], strict=True):
            assert (a.place, a.probe, a.chosen, a.tune_accuracy) == (b.place, b.probe, b.chosen, b.tune_accuracy)
            assert a.probe == "knn" or a.sweep == b.sweep
            assert a.accuracy == pytest.approx(1 - b.accuracy), (
                "with two classes, swapped labels must give the complement"
            )


def test_the_linear_probe_is_fitted_to_all_training_images(shards: Path, run: Path, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    out, changes = tmp_path / "e", {"keep_features": True, "probes": "linear", "controls": False}
    result = mpp.evaluate(run, out=str(out), **keys(shards, **changes))
    data = _open(_checked(run, out, shards, **changes))
    labels = data.train.labels[np.concatenate([data.fit, data.tune])]
    for score in result.scores["encoder"]:
        x, val = (
            np.load(out / "arms/encoder/features" / part / f"{score.layer}-{score.pool}.npy")
            for part in ("train", "val")
        )
        scaler = StandardScaler().fit(x)
        theirs = LogisticRegression(C=1 / (len(x) * score.chosen), max_iter=2000).fit(scaler.transform(x), labels)
        assert theirs.score(scaler.transform(val), data.val.labels) == pytest.approx(score.accuracy, abs=0.05)
        fewer = len(data.fit)
        theirs.fit(scaler.transform(x)[:fewer], labels[:fewer])
        assert theirs.score(scaler.transform(x)[fewer:], labels[fewer:]) == pytest.approx(score.tune_accuracy, abs=0.15)


def test_only_the_encoder_runs_in_bf16(shards: Path, run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Probes are trained without autocast: under it, a probe would read a cast of its weights from before the step."""
    real, seen = attentive.train, []

    def watched(probes: Any, batches: Any, **rest: Any) -> None:
        def watching(epoch: int) -> Any:
            for tokens, labels in batches(epoch):
                seen.append(torch.is_autocast_enabled("cpu"))
                assert all(t.dtype == torch.float32 for t in tokens.values())
                yield tokens, labels

        real(probes, watching, **rest)

    monkeypatch.setattr(attentive, "train", watched)
    small = {"controls": False, "probes": ["attentive", "linear"], "keep_features": True}
    mpp.evaluate(run, out=str(tmp_path / "h"), precision="bf16", **keys(shards, **small))
    assert seen
    assert not any(seen)
    mpp.evaluate(run, out=str(tmp_path / "f"), **keys(shards, **small))
    half, full = (np.load(tmp_path / o / "arms/encoder/features/val/2-mean.npy") for o in "hf")
    assert np.abs(half - full).max() > 1e-4, "the encoder must have run in bf16"


@pytest.mark.slow
def test_from_the_command_line(shards: Path, run: Path, tmp_path: Path) -> None:
    words = [f"{k}={json.dumps(v)}" for k, v in keys(shards, controls=False, probes="linear").items()]
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    done = command("evaluate", copy, *words)
    assert done.returncode == 0, done.stderr
    assert "the encoder" in done.stdout
    assert (copy / "evaluation" / "evaluation.png").exists(), "by default, the results must be inside the run"
    done = command("evaluate", copy, "encoder=x", *words)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "command line: encoder: is the first word" in done.stderr
    recipe = tmp_path / "evaluate.yaml"
    recipe.write_text("job: evaluate\nattentive: {epochs: 0}\nprobe: knn\n")
    words = [w for w in words if not w.startswith("attentive.epochs")]
    done = command("evaluate", copy, "--recipe", recipe, *words)
    assert done.returncode == 2
    assert f"{recipe}:2: attentive.epochs: must be >= 1; got 0" in done.stderr
    assert f"{recipe}:3: probe: unknown key. Did you mean 'probes'?" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "nowhere/at-all"}, "encoder: 'nowhere/at-all': no such folder, and no such model of timm"),
        ({"compare": "vit_tiny_patch61_224"}, "compare: 'vit_tiny_patch61_224': no such folder.*Did you mean vit_"),
        ({"layers": [3]}, r"layers: 3: VisionTransformer has 1 to 2 here"),
        ({"layers": [0]}, r"layers.0: must be >= 1; got 0"),
        ({"probes": "svm"}, r"probes.0: no such choice; got 'svm'.*Choose from knn, linear, attentive"),
        ({"data.image_size": 18}, "stride of 4 px; expected multiples of it, got 18×18"),
        ({"data.labels_per_class": 1}, "data.train: at least one class needs two or more images, to tune the probes on"),
        ({"data.labels_per_class": 999}, "data.labels_per_class: 999, but class"),
        ({"tune_fraction": 1.0}, "tune_fraction: must be > 0 and < 1"),
        ({"architecture.name": "vit_tiny_patch16_224"}, r"architecture\.name: only with encoder: scratch"),
    ],
)  # fmt: skip
def test_wrong_inputs(changes: dict[str, Any], message: str, shards: Path, run: Path, tmp_path: Path) -> None:
    given_keys = {**keys(shards), "encoder": str(run), "out": str(tmp_path / "e"), **changes}
    with pytest.raises(UserError, match=message) as caught:
        mpp.evaluate(**given_keys)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "e").exists(), "wrong inputs must be refused before anything is written"


def test_validation_images_that_were_trained_on(shards: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.val: the same images as data\.train"):
        mpp.evaluate(run, out=str(tmp_path / "e"), **keys(shards, **{"data.train": str(shards / "shard-000000.tar")}))
