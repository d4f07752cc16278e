"""Warnings: runs that are broken on purpose get theirs, healthy runs get none."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpp
from mpp.data.shards.pack import pack
from mpp.errors import UserError
from mpp.runs.history import History, read_run
from mpp.runs.symptoms import RECENT, Measured, flat_since, symptoms, underfit
from mpp.runs.verdict import estimate
from tests.conftest import drawn_image, encoded, pretrain_recipe

LONG = {
    "optim.steps": 120, "optim.warmup_steps": 5, "log_every_steps": 4, "skill_every_steps": 10,
    "checkpoint_every_steps": 1000, "data.held_out": 40, "reconstruct_images": 0, "data.workers": 1,
    "encoder.args": {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 2}, "optim.base_lr": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return shards of 200 drawn images."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "images").mkdir()
    for i in range(200):
        (folder / "images" / f"{i}.png").write_bytes(encoded(drawn_image(i)))
    pack(str(folder / "images"), str(folder / "shards"), workers=1)
    return folder / "shards"


def kinds(run: Path) -> list[str]:
    return [s.kind for s in symptoms(read_run(run))]


def trained(shards: Path, out: Path, **changes: Any) -> Path:
    return mpp.pretrain(pretrain_recipe(shards, out, **{**LONG, **changes})).out


def test_a_healthy_run_has_none(many: Path, tmp_path: Path) -> None:
    run = read_run(trained(many, tmp_path / "run"))
    assert symptoms(run) == []
    assert (run.last("feature_rank") or 0) > 2


@pytest.mark.slow
def test_a_collapsed_teacher(many: Path, tmp_path: Path) -> None:
    target = {"name": "ema_teacher", "decay": 0.0, "decay_end": 0.0}
    shrinking = {"optim.base_lr": 1.6e-2, "optim.weight_decay": 500.0}  # halves all matrices in each step
    run = trained(many, tmp_path / "run", target=target, corruption="token", **shrinking)
    assert "collapse" in kinds(run)
    assert "Collapse of target ema_teacher: effective rank" in symptoms(read_run(run))[0].text


def test_collapsed_features(many: Path, tmp_path: Path) -> None:
    """With zero weights in the patch embedding, all images are the same to the encoder. Only the positions remain."""
    run = trained(many, tmp_path / "run", **{"optim.steps": 20, "optim.base_lr": 1e-9, "mask.ratio": 0.94})
    import torch

    from mpp.pretraining.monitor import spread

    model = mpp.load_encoder(run)
    images = torch.randn(40, 3, 16, 16)
    assert spread(model.eval(), images).rank > 2
    torch.nn.init.zeros_(model.patch_embed.proj.weight)  # type: ignore[union-attr, arg-type]
    found = spread(model.eval(), images)
    assert found.share < 1e-6
    lines = [{**m, **{f"feature_{k}": v for k, v in found._asdict().items()}} for m in read_run(run).metrics]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "collapse" in kinds(run)


def test_a_data_bound_run(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    for i in range(16):
        (tmp_path / "large" / f"{i}.jpg").write_bytes(encoded(drawn_image(i, 1600), "JPEG"))
    pack(str(tmp_path / "large"), str(tmp_path / "shards"), workers=1)
    changes = {"data.held_out": 2, "data.workers": 0, "optim.steps": 20, "log_every_steps": 2, "skill_every_steps": 20}
    assert "data_bound" in kinds(trained(tmp_path / "shards", tmp_path / "run", **changes))


def test_a_run_that_ends_in_infinity(many: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stopped before the update"):
        trained(many, tmp_path / "run", **{"optim.base_lr": 1e8, "log_every_steps": 1})
    found = symptoms(read_run(tmp_path / "run"))
    assert found[0].kind == "failed"
    assert "It ended at step 1: loss nan, gradient norm nan: stopped before the update" in found[0].text
    assert "A lower optim.base_lr" in found[0].advice


@pytest.mark.parametrize(
    ("why", "advice"),
    [
        ("data.max_bad_fraction: 200 of 1000 images could not be read", "train.log names the images."),
        ("process 1 (pid 7 on here) is gone", "--resume auto"),
    ],
)
def test_what_a_run_that_failed_is_advised(why: str, advice: str, many: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(many, run, **{"optim.steps": 2})
    (run / "status.json").write_text(json.dumps({"state": "failed", "step": 1, "why": why}))
    found = symptoms(read_run(run))[0]
    assert (found.kind, found.text) == ("failed", f"It ended at step 1: {why}.")
    assert advice in found.advice


def test_a_diverging_run(many: Path, tmp_path: Path) -> None:
    """The learning rate grows, so the loss falls and then rises again."""
    run = trained(many, tmp_path / "run", target="pixels", **{"optim.base_lr": 30.0, "optim.warmup_steps": 120})
    assert kinds(run)[0] == "diverged"


def test_a_flat_run(many: Path, tmp_path: Path) -> None:
    assert "flat" in kinds(trained(many, tmp_path / "run", **{"optim.base_lr": 1e-9}))


def test_a_skill_below_the_trivial_prediction(many: Path, tmp_path: Path) -> None:
    assert kinds(trained(many, tmp_path / "run", **{"optim.steps": 4, "optim.base_lr": 0.5})) == ["below_trivial"]


def test_many_bad_images(tmp_path: Path) -> None:
    import tarfile

    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i in range(120):
            path = tmp_path / f"{i}.png"
            data = encoded(drawn_image(i))
            path.write_bytes(data[:60] if i % 6 == 0 else data)
            tar.add(path, path.name)
    changes = {"optim.steps": 20, "data.max_bad_fraction": 1.0, "skill_every_steps": 20}
    assert "bad_images" in kinds(trained(folder, tmp_path / "run", **changes))


# ---- from records only


def history(job: str = "pretrain", **parts: Any) -> History:
    given: dict[str, Any] = {"recipe": {}, "env": {}, "status": {}, "metrics": [], "result": {}, **parts}
    return History(Path("runs/a"), job, **given)


def records(**series: list[float]) -> list[dict[str, Any]]:
    count = len(next(iter(series.values())))
    return [{"step": 10 * i, "seen": 160 * i, **{k: v[i] for k, v in series.items()}} for i in range(count)]


def test_a_run_that_was_paused_is_not_data_bound() -> None:
    waits = [0.9, 0.02, 0.02, 0.95, 0.02, 0.02]
    assert symptoms(history(metrics=records(data_wait=waits, loss=[6, 5, 4, 3, 2, 1]))) == []


@pytest.mark.parametrize(
    ("paces", "seen_each", "found"),
    [
        ([400.0] * 20 + [40.0] * 6, 3200, ["slower"]),
        ([400.0] * 20 + [40.0] * 6, 100, []),  # too short
        ([400.0] * 20 + [40.0] * 2 + [390.0] * 4, 3200, []),  # has recovered
        ([40.0] * 3 + [400.0] * 20, 3200, []),
        ([400.0] * 20 + [250.0] * 6, 3200, []),
    ],
)
def test_a_run_that_slowed_down(paces: list[float], seen_each: int, found: list[str]) -> None:
    metrics = [
        {"step": i, "seen": i * seen_each, "loss": 1 / i, "skill": 0.1 + i / 100, "images_per_s": pace}
        for i, pace in enumerate(paces, 1)
    ]
    assert [s.kind for s in symptoms(history(metrics=metrics, status={"steps": len(paces)}))] == found


def test_a_noisy_loss_beside_a_rising_skill_is_not_flat() -> None:
    losses = [1.2, 0.60, 0.56, 0.53, 0.53, 0.57, 0.55, 0.60]
    flat = history(metrics=records(loss=losses), status={"steps": 70})
    assert [s.kind for s in symptoms(flat)] == ["flat"]
    rising = history(
        metrics=records(loss=losses, skill=[0.1, 0.1, 0.34, 0.34, 0.37, 0.37, 0.39, 0.39]), status={"steps": 70}
    )
    assert symptoms(rising) == []


def test_a_probe_that_was_taken_away_is_not_flat() -> None:
    """With a moving target, only the probe shows progress. Its last value must not count for later steps."""
    lines = [
        {"step": n, "seen": n, "loss": 1.0, "skill": 0.1, "target_share_ema_teacher": 0.5}
        | ({"probe_accuracy": 0.2 + n / 10_000} if n <= 2000 else {})
        for n in range(500, 8001, 500)
    ]
    assert symptoms(history(metrics=lines, status={"steps": 8000})) == []


def test_how_far_a_run_came() -> None:
    """A running run has the status of its last checkpoint, so its metrics count. An ended run has its last step."""
    lines = [{"step": 1, "seen": 1}, {"step": 50, "seen": 50}]
    for state, step, came in (("running", 40, 50), ("stopped", 73, 73), ("failed", 73, 73), ("running", None, 50)):
        assert history(metrics=lines, status={"state": state, "step": step}).step == came
    assert history(status={"state": "running", "step": 40}).step == 40


def test_the_loss_of_a_moving_target_may_do_as_it_likes() -> None:
    series = {"loss": [1.0] * 12, "skill": [-0.1] * 12, "target_share_ema_teacher": [0.5] * 12}
    assert symptoms(history(metrics=records(**series, target_rank_ema_teacher=[9.0] * 12))) == []


def gain(mean: float, half_width: float | None) -> dict[str, Any]:
    values = [mean] if half_width is None or half_width != half_width else [mean - 0.01, mean + 0.01]
    return {"verdicts": [{"labels_per_class": 10, "gain": {"mean": mean, "half_width": half_width, "values": values}}]}


@pytest.mark.parametrize(
    ("mean", "half_width", "found"),
    [
        (0.05, 0.02, []),
        (0.01, 0.02, ["At 10 labels a class a gain is not shown with 2 seeds"]),
        (-0.1, 0.02, ["At 10 labels a class pretraining hurt"]),
        (0.05, None, []),
        (-0.01, None, []),
    ],
)
def test_a_gain_that_is_not_shown(mean: float, half_width: float | None, found: list[str]) -> None:
    """The conclusion is that of the terminal. From one seed there is none."""
    for stored in (half_width, float("nan") if half_width is None else half_width):
        seen = symptoms(history("finetune", result=gain(mean, stored)))
        assert [s.kind for s in seen] == ["no_gain"] * len(found)
        assert all(s.text.startswith(text) for s, text in zip(seen, found, strict=True))


def test_leaks_are_named() -> None:
    leak = {"shared": 3, "checked": 50, "examples": [["val/a.png", "train/b.png"]]}
    run = history("finetune", data={"val_in_train": leak, "val_in_pretraining": None})
    assert symptoms(run)[0].text.startswith("3 of 50 validation images are among data.train, byte by byte: val/a.png")


def test_an_encoder_no_better_than_its_controls() -> None:
    def scores(value: float) -> dict[str, Any]:
        return {"knn": {"accuracy": value}}

    best = {"encoder": scores(0.2), "random": scores(0.25), "pixels": scores(0.1)}
    assert [s.kind for s in symptoms(history("evaluate", result={"best": best}))] == ["control"]


def test_a_dead_process() -> None:
    import platform
    import subprocess

    gone = subprocess.Popen(["true"])
    gone.wait()
    run = history(status={"state": "running", "host": platform.node(), "pid": gone.pid})
    assert [s.kind for s in symptoms(run)] == ["dead"]
    run.status["host"] = "another machine"
    assert symptoms(run) == []


def measurements(skills: list[float], probes: list[float | None] | None = None) -> list[Measured]:
    return [Measured(10 * (i + 1), s, p) for i, (s, p) in enumerate(zip(skills, probes or [None] * 99, strict=False))]


@pytest.mark.parametrize(
    ("skills", "probes", "since"),
    [
        ([0.1, 0.2, 0.2, 0.2], None, None),  # too few to tell
        ([0.1, 0.3, 0.3, 0.29, 0.3, 0.301], None, 20),
        ([0.1, 0.3, 0.3, 0.29, 0.3, 0.31], None, None),  # skill rises
        ([0.1, 0.3, 0.3, 0.29, 0.3, 0.3], [0.4, 0.5, 0.5, 0.5, 0.5, 0.6], None),  # the probe rises
        ([0.1, 0.3, 0.3, 0.29, 0.3, 0.3], [0.4, 0.5, 0.5, 0.5, 0.5, 0.5], 20),
        ([0.1, 0.3, 0.3, 0.29, 0.3, 0.3], [None, None, 0.4, 0.4, 0.4, 0.4], None),  # the probe is new
        ([0.5, 0.3, 0.2, 0.1, 0.1, 0.1], None, 10),  # the skill falls
    ],
)
def test_flat(skills: list[float], probes: list[float | None] | None, since: int | None) -> None:
    assert RECENT == 4
    assert flat_since(measurements(skills, probes)) == since


@pytest.mark.parametrize(
    ("last_loss", "changes", "found"),
    [
        (2.7, {}, True),
        (1.2, {}, False),
        (2.7, {"task": {"name": "multilabel"}}, False),
        (2.7, {"unlabeled": {"images": "photos"}}, False),
    ],
)
def test_a_fine_tune_that_ended_too_early(last_loss: float, changes: dict[str, Any], found: bool) -> None:
    """Guessing among 20 classes has a loss of 3.0. After 300 steps, a run on photographs was at 2.7."""
    losses = np.linspace(3.0, last_loss, 40).tolist()
    said = underfit("pretrained-seed0", records(loss=losses), changes, 20)
    assert said == (
        f"pretrained-seed0 is underfit: its training loss ended at {np.median(losses[-10:]):.2f}, "
        "and a mere guess among 20 classes has 3.00." if found else ""
    )  # fmt: skip
    run = history("finetune", data={"classes": 20}, recipe=changes)
    for approach in ("cnn", "pretrained"):  # the CNN has keys of its own
        trial = History(Path(f"runs/a/{approach}-seed0"), "trial", {}, {}, {}, records(loss=losses), {"metrics": {}})
        run.trials.append(trial)
    assert [s.kind for s in symptoms(run)] == ["underfit"] * found


def test_a_better_approach_is_named() -> None:
    def estimated(*values: float) -> dict[str, Any]:
        return asdict(estimate(list(values)))

    score = {"pretrained": estimated(0.48, 0.47, 0.49), "cnn": estimated(0.61, 0.60, 0.62)}
    (seen,) = symptoms(history("finetune", result={"verdicts": [{"score": score}]}))
    assert seen.kind == "better_approach"
    assert seen.text.startswith("Best here is the CNN from scratch, 13.0 points above the pretrained encoder")
    assert "in the folders cnn-seed*" in seen.advice
    for ours, theirs in ((0.61, 0.48), (0.48, 0.485)):
        score = {"pretrained": estimated(ours, ours + 0.02), "cnn": estimated(theirs, theirs + 0.01)}
        assert symptoms(history("finetune", result={"verdicts": [{"score": score}]})) == []
