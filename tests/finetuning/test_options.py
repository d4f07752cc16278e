"""Frozen encoders and unfreezing, averaged weights, class imbalance, early stopping."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import mpp
from mpp.data.subsets import balanced, split
from mpp.encoders.creation import create_timm_model
from mpp.errors import UserError
from mpp.finetuning import augment, image_labels, judge, loop
from mpp.finetuning.judge import Judged
from mpp.finetuning.model import build
from mpp.finetuning.open_labels import open_label_kind
from mpp.finetuning.setup import make_plan
from mpp.finetuning.tasks.classify import ClassifyTask
from mpp.runs.records import read_metrics
from mpp.training import optimizer as optim
from mpp.training.batch_norms import AT_ONCE, LEAST_IMAGES, batch_norms_of, measure_batch_norms
from tests.conftest import command, drawn_image, encoded, pretrain_recipe
from tests.finetuning.test_finetuning import recipe

TRIAL = "pretrained-seed0"


def weights(run_folder: Path, step: int, trial: str = TRIAL, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run_folder / trial / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def tuned(shards: Path, out: Path, encoder: Path, **changes: Any) -> Any:
    small = {"seeds": [0], "beside": [], "optim.steps": 12, "checkpoint_every_steps": 1}
    return mpp.finetune(recipe(shards, out, encoder, **{**small, "keep_checkpoints": 99, **changes}))


def moved(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    """Return the parts of the model that differ: blocks.0, blocks.1, head, …"""
    names = {k for k in a if not torch.equal(a[k], b[k])}
    return {
        ".".join(n.split(".")[1:3]) if ".blocks." in n else "head" if n.startswith("task") else n.split(".")[1]
        for n in names
    }


def test_few_images_get_the_least_number_of_steps(shards: Path, run: Path, tmp_path: Path) -> None:
    lengths = {"optim.steps": None, "optim.epochs": 10, "optim.warmup_steps": None, "optim.warmup_epochs": 2}
    lengths |= {"optim.min_steps": 30, "optim.global_batch_size": 20}

    def steps(images: int, **changes: Any) -> tuple[int, int]:
        plan = make_plan(recipe(shards, tmp_path, run, **lengths | changes), images, world=1, steps=None)
        return plan.total_steps, plan.warmup_steps

    assert steps(400) == (200, 40)
    assert steps(40) == (30, 6), "the warm-up stays the same part of the run"
    assert steps(40, **{"optim.warmup_steps": 3, "optim.warmup_epochs": 0}) == (30, 3)
    assert steps(40, **{"optim.epochs": None, "optim.steps": 5})[0] == 5


def test_a_frozen_encoder_stands_still(shards: Path, run: Path, tmp_path: Path) -> None:
    tuned(shards, tmp_path / "o", run, frozen=1.0, beside=["scratch"])
    assert moved(weights(tmp_path / "o", 1), weights(tmp_path / "o", 12)) == {"head"}
    before = mpp.load_encoder(run).state_dict()
    after = mpp.load_encoder(tmp_path / "o" / TRIAL).state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k in after and not k.startswith("head"))
    scratch = moved(weights(tmp_path / "o", 1, "scratch-seed0"), weights(tmp_path / "o", 12, "scratch-seed0"))
    assert "blocks.0" in scratch, "the encoder from scratch must be trained, whatever frozen is"


def test_first_the_head_then_everything(shards: Path, run: Path, tmp_path: Path) -> None:
    tuned(shards, tmp_path / "o", run, frozen=0.5)
    assert moved(weights(tmp_path / "o", 1), weights(tmp_path / "o", 6)) == {"head"}
    assert {"blocks.0", "blocks.1", "patch_embed"} <= moved(weights(tmp_path / "o", 6), weights(tmp_path / "o", 7))


def test_the_last_block_first(shards: Path, run: Path, tmp_path: Path) -> None:
    """timm counts three layers here: the stem, a block, the last block with its norm. In 12 steps, one thaws every 4
    steps.
    """
    tuned(shards, tmp_path / "o", run, frozen=1.0 - 1e-9, unfreeze="gradual")
    seen = [moved(weights(tmp_path / "o", a), weights(tmp_path / "o", a + 1)) for a in range(1, 12)]
    thawed = {
        part: next(i + 2 for i, s in enumerate(seen) if part in s) for part in ("head", "norm", "blocks.1", "blocks.0")
    }
    assert thawed == {"head": 2, "norm": 5, "blocks.1": 5, "blocks.0": 9}
    assert not any("patch_embed" in s for s in seen), "the stem must thaw only after the last step"


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "coatnet_nano_rw_224", "resnet10t"])
def test_layers_are_counted_from_the_top(name: str) -> None:
    model = create_timm_model(name, image_size=(224, 224), in_chans=3, pretrained=False, args={})
    groups = optim.finetune_groups(model, torch.nn.Linear(2, 2), weight_decay=0.1, layer_decay=1.0, head_lr_scale=1.0)
    optim.unfreeze(groups, frozen_steps=1000, gradual=True)
    named = {id(p): n for n, p in model.named_parameters()}
    first = next(iter(named))
    starts = {id(p): g.get("starts_at_step", 0) for g in groups for p in g["params"]}
    assert starts[first] == 1000, "the stem must thaw last"
    assert min(starts[i] for i in named) > 0
    assert min(starts.values()) == 0, "the head must train from the first step"
    optim.unfreeze(groups, frozen_steps=7, gradual=False)
    assert {g.get("starts_at_step", 0) for g in groups} == {0, 7}


def test_the_average_of_the_weights_is_what_is_judged(shards: Path, run: Path, tmp_path: Path) -> None:
    tuned(shards, tmp_path / "o", run, ema_decay=0.9)
    mean = weights(tmp_path / "o", 1, name="averaged")
    for step in range(2, 13):
        now = weights(tmp_path / "o", step)
        decay = min(0.9, (1 + step) / (10 + step))
        mean = {k: torch.lerp(mean[k], now[k], 1 - decay) for k in now}
    stored = weights(tmp_path / "o", 12, name="averaged")
    for k, value in stored.items():
        torch.testing.assert_close(mean[k], value)
    exported = mpp.load_encoder(tmp_path / "o" / TRIAL).state_dict()
    torch.testing.assert_close(exported["blocks.0.mlp.fc1.weight"], stored["encoder.blocks.0.mlp.fc1.weight"])
    assert not torch.equal(
        exported["blocks.0.mlp.fc1.weight"], weights(tmp_path / "o", 12)["encoder.blocks.0.mlp.fc1.weight"]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.9, "frozen": 0.4},
        {"early_stop.every_steps": 3, "balance": "loss"},
        {"optim.name": "sgd", "frozen": 0.7, "unfreeze": "gradual"},  # some weights get momentum only after the cut
        {"optim.name": "muon", "optim.layer_decay": 0.5},
    ],
)
def test_killed_and_resumed_it_is_the_same(
    changes: dict[str, Any],
    shards: Path,
    run: Path,
    tmp_path: Path,
) -> None:
    whole = tuned(shards, tmp_path / "whole", run, **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    trial = tmp_path / "cut" / TRIAL
    (trial / "result.json").unlink()
    for step in range(8, 13):
        shutil.rmtree(trial / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    given = {
        "seeds": [0],
        "beside": [],
        "optim.steps": 12,
        "checkpoint_every_steps": 1,
        "keep_checkpoints": 99,
    }
    again = mpp.finetune(recipe(shards, tmp_path / "cut", run, **given, **changes), resume="auto")
    assert again.verdicts == whole.verdicts
    a, b = ([(m["step"], m["loss"]) for m in read_metrics(tmp_path / o / TRIAL)] for o in ("whole", "cut"))
    assert a == b


def test_early_stopping(shards: Path, run: Path, tmp_path: Path) -> None:
    """At a learning rate near 0 the score never rises, so training stops and keeps the best weights."""
    given = {"early_stop": {"every_steps": 2, "patience": 3, "fraction": 0.3}, "optim.base_lr": 1e-9, "optim.steps": 40}
    tuned(shards, tmp_path / "o", run, **given)
    trial = tmp_path / "o" / TRIAL
    measured = [m["step"] for m in read_metrics(trial) if "tune_accuracy" in m]
    assert measured == [2, 4, 6, 8], "step 2 is the best, followed by three measurements without a better one"
    assert [p.name for p in (trial / "best").iterdir()] == ["step-00000002"]
    best = load_file(trial / "best" / "step-00000002" / "model.safetensors")
    exported = mpp.load_encoder(trial).state_dict()
    assert torch.equal(exported["blocks.0.mlp.fc1.weight"], best["encoder.blocks.0.mlp.fc1.weight"])
    assert "step 2 of 8: best on 6 training images held out" in (trial / "train.log").read_text()
    small = {"seeds": [0], "beside": [], "checkpoint_every_steps": 1, "keep_checkpoints": 99}
    # killed between the last checkpoint and the verdict, and after one measurement without a new best
    for killed_after in (8, 5):
        (trial / "result.json").unlink()
        for step in range(killed_after + 1, 9):
            shutil.rmtree(trial / "checkpoints" / f"step-{step:08d}")
        again = mpp.finetune(recipe(shards, tmp_path / "o", run, **small, **given), resume="auto")
        assert again.state == "finished"
        assert [m["step"] for m in read_metrics(trial)][-1] == 8, "the resumed run must not train further"


def test_what_is_held_out_is_not_trained_on(shards: Path, run: Path, tmp_path: Path) -> None:
    given = {"early_stop": {"every_steps": 4, "fraction": 0.3}, "drop_path_rate": 0.3}
    tuned(shards, tmp_path / "o", run, **given)
    log = (tmp_path / "o" / TRIAL / "train.log").read_text()
    assert "14 labeled images of 2 classes" in log, "6 of the 20 images must be held out"
    losses = [m["loss"] for m in read_metrics(tmp_path / "o" / TRIAL)]
    rarely = {"early_stop": {"every_steps": 12, "fraction": 0.3}, "drop_path_rate": 0.3}
    tuned(shards, tmp_path / "r", run, **rarely)
    assert [m["loss"] for m in read_metrics(tmp_path / "r" / TRIAL)] == losses, (
        "how often the held-out images are scored must not change training"
    )


def test_the_validation_images_do_not_stop_it(shards: Path, run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    given = {"early_stop": {"every_steps": 2, "patience": 2, "fraction": 0.3}, "ema_decay": 0.5}
    straight = tuned(shards, tmp_path / "a", run, **given)
    real = image_labels.open_labeled

    def turned(spec: Any, *, key: str, **rest: Any) -> Any:
        found = real(spec, key=key, **rest)
        return dataclasses.replace(found, labels=1 - found.labels) if key == "data.val" else found

    monkeypatch.setattr(image_labels, "open_labeled", turned)
    other = tuned(shards, tmp_path / "b", run, **given)
    a, b = ([m.get("tune_accuracy") for m in read_metrics(tmp_path / o / TRIAL)] for o in "ab")
    assert a == b
    assert other.score["pretrained"].mean == pytest.approx(1 - straight.score["pretrained"].mean)
    (best,) = (tmp_path / "a" / TRIAL / "best").iterdir()
    averaged = load_file(best / "averaged.safetensors")
    exported = mpp.load_encoder(tmp_path / "a" / TRIAL).state_dict()
    assert torch.equal(exported["blocks.0.mlp.fc1.weight"], averaged["encoder.blocks.0.mlp.fc1.weight"])


def test_a_best_that_a_checkpoint_names_stays(shards: Path, run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A run that is killed after a new best and before the next checkpoint resumes from one that names the old best."""
    real, scores, there = judge.judge, iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), []

    def rising(recipe: Any, team: Any, kind: Any, model: Any, images: Any, chosen: Any, key: str, **rest: Any) -> Any:
        if key != "early_stop":
            return real(recipe, team, kind, model, images, chosen, key, **rest)
        best = tmp_path / "o" / TRIAL / "best"
        there.append(sorted(int(p.name[5:]) for p in best.iterdir()) if best.exists() else [])
        return Judged({"accuracy": next(scores)}, None, 0, [], [])

    monkeypatch.setattr(loop, "judge", rising)
    tuned(shards, tmp_path / "o", run, early_stop={"every_steps": 2}, checkpoint_every_steps=5)
    assert there == [[], [2], [4], [4, 6], [4, 6, 8], [10]], (
        "older bests must be deleted at the checkpoints of steps 5 and 10"
    )
    assert [p.name for p in (tmp_path / "o" / TRIAL / "best").iterdir()] == ["step-00000012"]


RESNET = {"architecture": {"name": "resnet10t"}, "data.image_size": 32}


def test_batch_norms_of_a_frozen_encoder_stand_still(shards: Path, tmp_path: Path) -> None:
    part, whole = (
        tuned(shards, tmp_path / name, "scratch", **RESNET, frozen=frozen, **{"scratch.frozen": frozen, "optim.clip_grad_norm": 0.3})  # type: ignore[arg-type]
        for name, frozen in (("part", 0.5), ("whole", 1.0))
    )  # fmt: skip
    assert part.state == whole.state == "finished"
    trial = "scratch-seed0"
    states = [weights(tmp_path / "part", step, trial) for step in (1, 6, 7)]
    statistics = [k for k in states[0] if "running_mean" in k]
    assert statistics
    assert all(torch.equal(states[0][k], states[1][k]) for k in statistics)
    assert not all(torch.equal(states[1][k], states[2][k]) for k in statistics), (
        "the statistics must change once the encoder has thawed"
    )
    norms = [[m["grad_norm"] for m in read_metrics(tmp_path / name / trial)][:6] for name in ("part", "whole")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5), (
        "only the gradient of the head is clipped, so only its norm counts"
    )


@pytest.mark.parametrize(
    "changes", [{}, {"ema_decay": 0.9, "mixup": 0.4}, {"early_stop": {"every_steps": 5, "fraction": 0.05}}]
)
def test_batch_norms_have_the_statistics_of_training_images_as_they_are_judged(
    changes: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    changes = {"seeds": [0], "beside": [], "optim.steps": 12, "data.labels_per_class": None, **changes}
    given = recipe(shards, tmp_path / "o", "scratch", **RESNET, **changes)
    mpp.finetune(given)
    trial = tmp_path / "o" / "scratch-seed0"
    exported = mpp.load_encoder(trial).state_dict()
    model = build(given, "scratch", 0, 2)
    kind = open_label_kind(given)
    train = kind.open(given.data.train, key="data.train", classes=None)
    subset = train.subset(labels_per_class=None, fraction=None, seed=0)
    if given.early_stop:
        subset = subset[split(train.strata[subset], given.early_stop.fraction, 0)[0]]
    batch = kind.judging_set(train).__getitems__(subset.tolist())
    assert LEAST_IMAGES <= len(batch.images) <= AT_ONCE
    model.encoder.load_state_dict({k: v for k, v in exported.items() if not k.startswith("fc.")}, strict=False)
    measure_batch_norms(model, batch_norms_of(model), [model.normalise(batch.images)])
    statistics = {k: v for k, v in model.encoder.state_dict().items() if "running" in k}
    assert statistics
    for name, value in statistics.items():
        torch.testing.assert_close(value, exported[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_batch_norms_on_two_processes(shards: Path, image_folder: Path, tmp_path: Path) -> None:
    """The reported accuracy equals the accuracy of the exported model."""
    import yaml

    from tests.finetuning.test_finetuning import values

    given = {
        **RESNET,
        "seeds": [0],
        "optim.steps": 12,
        "ema_decay": 0.5,
        "data.val": str(image_folder),
        "data.workers": 0,
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values(shards, tmp_path / "o", "scratch", **given)))
    done = command("finetune", path, processes=2)
    assert done.returncode == 0, done.stderr
    trial = tmp_path / "o" / "scratch-seed0"
    report = mpp.predict(trial, [str(image_folder)], report=tmp_path / "report")[2]
    assert report is not None
    stored = json.loads((trial / "result.json").read_text())["metrics"]
    assert report.accuracy == pytest.approx(stored["accuracy"])


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "ghostnet_100", "xcit_nano_12_p8_224"])
def test_families_with_a_way_of_their_own(name: str, shards: Path) -> None:
    """Models that widen after pooling, take no drop_path_rate, or have no fc_norm."""
    model = build(
        recipe(shards, "o", "scratch", architecture={"name": name}, **{"data.image_size": 64}), "scratch", 0, 2
    )
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 2)  # type: ignore[union-attr]


def test_uneven_classes(shards: Path, tmp_path: Path) -> None:
    labels = np.array([0] * 10 + [2] * 3)
    chosen = balanced(labels, 0)
    assert np.bincount(labels[chosen]).tolist() == [10, 0, 10]
    assert set(np.bincount(chosen)[10:]) == {3, 4}, "images of the rare class must be drawn about equally often"
    assert np.array_equal(chosen, balanced(labels, 0))

    task = ClassifyTask(4, 3)
    task.weigh(torch.tensor([10, 0, 3]))
    logits, y = torch.randn(13, 3, generator=torch.Generator().manual_seed(0)), torch.from_numpy(labels)
    each = F.cross_entropy(logits, y, reduction="none")
    wanted = (each[:10].mean() + each[10:].mean()) / 2
    torch.testing.assert_close(task.loss(logits, y), wanted)  # as if all classes had equally many images
    torch.testing.assert_close(task.loss(logits, F.one_hot(y, 3).float()), wanted)
    assert "class_weights" not in task.state_dict()


@pytest.mark.parametrize("balance", ["sampling", "loss"])
def test_a_rare_class_is_not_forgotten(balance: str, tmp_path: Path) -> None:
    """Training set of thirty images against three: balancing makes the model predict the rare class more often."""
    for part, counts in (("train", (30, 3)), ("val", (20, 20))):
        for label, count in zip(("disc", "square"), counts, strict=True):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                number = 2 * (i + 100 * (part == "val")) + (label == "square")
                (folder / f"{i}.png").write_bytes(encoded(drawn_image(number)))
    found = {}
    for kind in ("none", balance):
        keys = {
            "data.train": str(tmp_path / "train"), "data.val": str(tmp_path / "val"), "data.labels_per_class": None,
            "architecture": {"name": "vit_tiny_patch16_224", "args": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}},
            "seeds": [0], "optim.steps": 60, "balance": kind,
        }  # fmt: skip
        mpp.finetune(recipe(tmp_path, tmp_path / kind, "scratch", **keys))
        report = mpp.predict(tmp_path / kind / "scratch-seed0", [str(tmp_path / "val")], report=tmp_path / "r")[2]
        assert report is not None
        found[kind] = report.counts[:, 1].sum() / report.counts.sum()
    assert found["none"] < found[balance], "with balancing, the rare class must be predicted more often"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen": 1.5}, r"frozen: must be >= 0 and <= 1; got 1\.5"),
        ({"unfreeze": "slowly"}, r"unfreeze: no such choice; got 'slowly'.*Choose from at_once, gradual"),
        ({"ema_decay": 1.0}, r"ema_decay: must be >= 0 and < 1"),
        ({"balance": "yes"}, r"balance: no such choice; got 'yes'.*Choose from none, sampling, loss"),
        ({"unfreeze": "gradual"}, r"unfreeze: gradual: requires frozen between 0 and 1"),
        ({"early_stop.patience": 0}, r"early_stop\.patience: must be >= 1; got 0"),
        ({"early_stop.fraction": 0.5, "data.labels_per_class": 1}, "early_stop: needs a class with at least two"),
    ],
)
def test_wrong_inputs(changes: dict[str, Any], message: str, shards: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        tuned(shards, tmp_path / "o", run, **changes)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}),
        ("eva02_tiny_patch14_224", {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}),
        pytest.param("swin_tiny_patch4_window7_224", {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}, marks=pytest.mark.exhaustive),
        ("swinv2_tiny_window8_256", {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}),
    ],
)  # fmt: skip
def test_at_a_higher_resolution_than_in_pretraining(
    name: str, args: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    """Positions are interpolated and all other weights stay as pretrained, before training and after an export."""
    small = {"encoder": {"name": name, "args": args}, "corruption": "token", "optim.steps": 3}
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **small))
    still = {"data.image_size": 32, "optim.base_lr": 1e-12, "optim.steps": 1}
    tuned(shards, tmp_path / "o", tmp_path / "run", **still)
    mpp.verify(tmp_path / "o" / TRIAL)
    before = mpp.load_encoder(tmp_path / "run").state_dict()
    after = mpp.load_encoder(tmp_path / "o" / TRIAL).state_dict()
    same = [k for k in before if k in after and before[k].shape == after[k].shape]
    assert all(torch.allclose(before[k], after[k], atol=1e-8) for k in same)
    assert len(same) > 0.8 * len(before)
    if "pos_embed" in before:
        old, new = before["pos_embed"][:, -16:], after["pos_embed"][:, -64:]
        grid = old.reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        wanted = F.interpolate(grid, (8, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        torch.testing.assert_close(new, wanted)


@pytest.mark.parametrize("views", [2, 10])
def test_views_of_validation_images_are_those_of_predict(shards: Path, run: Path, tmp_path: Path, views: int) -> None:
    from mpp.data.labeled import open_labeled
    from mpp.finetuning.predict_images import Predictor

    val = shards / "shard-000000.tar"
    mpp.finetune(recipe(shards, tmp_path / "ft", run, seeds=[0], beside=[], **{"optim.steps": 4, "data.val_views": views}))  # fmt: skip
    trial = tmp_path / "ft" / "pretrained-seed0"
    stored = json.loads((trial / "result.json").read_text())["metrics"]
    data = open_labeled((str(val),), key="k", classes=None, cache_dir=None, cache_limit_bytes=1e9)
    predictor = Predictor(trial, views)  # type: ignore[arg-type]
    p = predictor.probabilities(torch.stack([predictor.crops(data.reader.read(i)) for i in range(len(data))]))
    assert stored["accuracy"] == pytest.approx(float((p.argmax(-1).numpy() == data.labels).mean()))
    from mpp.finetuning.tasks.classify import ClassifyTask

    again = ClassifyTask(8, 2).metrics([(p.log(), torch.from_numpy(data.labels))])
    assert stored == pytest.approx(again, abs=1e-4), "probabilities must be averaged, not logits"


@pytest.mark.parametrize(
    "policy", ["rand-m10-n15-inc1", "rand-m9-mstd0.5-inc1", "rand-m10-n15", "original", "v0r", "3a", "augmix-m10-w3"]
)
def test_every_operation_of_a_policy_runs(policy: str, shards: Path, tmp_path: Path) -> None:
    """At its strongest, timm posterises to 0 bits, which Pillow refuses. The policy of the recommended recipe may draw
    it.
    """
    chosen = recipe(
        shards, tmp_path / "o", "vit_tiny_patch16_224", **{"data.auto_augment": policy, "data.image_size": 16}
    )
    augmentation = augment.make_augmentation(chosen.data)
    for i in range(60):
        random.seed(i)
        np.random.seed(i)
        torch.manual_seed(i)
        assert np.asarray(augmentation(drawn_image(i))).shape == (3, 16, 16)


def test_no_bits_are_black() -> None:
    image = drawn_image(3)
    assert not np.asarray(augment._posterized(image, 0)).any()
    assert len(np.unique(np.asarray(augment._posterized(image, 1)))) == 2
    assert np.array_equal(np.asarray(augment._posterized(image, 8)), np.asarray(image))


def test_attention_pools(shards: Path, run: Path, tmp_path: Path) -> None:
    """The pooling is a new layer of timm's on the pretrained encoder. The export is a plain timm model with it."""
    small = {"seeds": [0], "beside": [], "optim.steps": 2, "optim.base_lr": 1e-9}
    result = mpp.finetune(recipe(shards, tmp_path / "ft", run, pool="attention", **small))
    assert result.encoder is not None
    config = json.loads((result.encoder / "config.json").read_text())
    assert config["global_pool"] == "map"
    before, after = (mpp.load_encoder(place).state_dict() for place in (run, result.encoder))
    torch.testing.assert_close(after["blocks.1.mlp.fc2.weight"], before["blocks.1.mlp.fc2.weight"], atol=1e-6, rtol=0)
    assert "attn_pool.latent" in after
    assert "attn_pool.latent" not in before
    mpp.verify(result.encoder)
    layers, depth = optim.layer_numbers(mpp.load_encoder(result.encoder, num_classes=0))
    assert {layers[name] for name in after if name.startswith("attn_pool.")} == {depth + 1}, (
        "the pooling must have the learning rate of the head"
    )
    architecture = {"name": "resnet10t"}
    with pytest.raises(UserError, match="pool: attention: timm's ResNet has no attention pooling; use pool=mean"):
        mpp.finetune(recipe(shards, tmp_path / "b", "scratch", architecture=architecture, pool="attention"))
