"""Fine-tuning: both approaches, intervals, bit-exact resuming, and each option once."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image

import mpp
from mpp.errors import MppWarning, UserError
from mpp.finetuning.consistency import Taught
from mpp.finetuning.model import build
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import check_recipe, load_recipe
from mpp.runs.records import read_metrics
from tests.conftest import command, drawn_image, encoded, pretrain_recipe
from tests.synchronisations import check_steady_steps

ARGS = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def values(shards: Path, out: Path, encoder: Path | str, **changes: Any) -> dict[str, Any]:
    from mpp.recipe.overrides import apply_overrides

    v: dict[str, Any] = {
        "job": "finetune",
        "out": str(out),
        "encoder": str(encoder),
        "seeds": [0, 1],
        "data": {
            "train": [str(shards / f"shard-{i:06d}.tar") for i in (1, 2)], "val": str(shards / "shard-000000.tar"),
            "image_size": 16, "workers": 0, "labels_per_class": 10,
            "crop_scale": [0.7, 1.0],
        },
        "optim": {"base_lr": 3e-2, "steps": 30, "global_batch_size": 20, "warmup_steps": 3, "layer_decay": 0.9},
        "log_every_steps": 1,
        "checkpoint_every_steps": 7,
    }  # fmt: skip
    apply_overrides(v, {}, changes)
    return v


def recipe(*args: Any, **changes: Any) -> FinetuneRecipe:
    return check_recipe(values(*args, **changes), FinetuneRecipe)


def test_both_approaches_with_intervals(
    shards: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mpp.parallel.devices.cores_in_use", lambda: "busy")
    result = mpp.finetune(recipe(shards, tmp_path / "ft", run))
    assert result.state == "finished"
    assert "note: busy\n" in capsys.readouterr().out
    assert result.score.keys() == {"pretrained", "scratch"}
    for approach in result.score.values():
        assert len(approach.values) == 2
        assert 0.4 < approach.mean <= 1, "two shapes must be told apart better than by chance"
    stored = json.loads((tmp_path / "ft" / "result.json").read_text())
    assert stored["gain"]["mean"] == pytest.approx(result.score["pretrained"].mean - result.score["scratch"].mean)
    assert stored["val_images"] == 25
    metrics = stored["verdicts"][0]["metrics"]["scratch"]
    assert metrics.keys() == {"accuracy", "balanced_accuracy", "auroc", "map", "ece"}
    assert metrics["accuracy"] == stored["score"]["scratch"]
    assert {p.name for p in (tmp_path / "ft").iterdir() if p.is_dir()} == {
        "pretrained-seed0", "pretrained-seed1", "scratch-seed0", "scratch-seed1",
    }  # fmt: skip
    trial = tmp_path / "ft" / "pretrained-seed0"
    assert [m["step"] for m in read_metrics(trial)] == list(range(1, 31))
    verified = mpp.verify(trial)
    assert verified.difference <= 1e-5
    classifier = timm.create_model(f"local-dir:{trial / 'encoder'}", pretrained=True).eval()
    assert classifier(torch.zeros(1, 3, 16, 16)).shape == (1, 2)
    assert json.loads((trial / "encoder" / "config.json").read_text())["label_names"] == ["disc", "square"]


def test_the_encoders_own_normalisation(shards: Path, tmp_path: Path) -> None:
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **{"optim.steps": 1, "data.mean": mean, "data.std": std}))
    few = {"seeds": [0], "optim.steps": 1}
    mpp.finetune(recipe(shards, tmp_path / "own", tmp_path / "run", **few))
    for approach in ("pretrained", "scratch"):
        config = json.loads((tmp_path / "own" / f"{approach}-seed0" / "encoder" / "config.json").read_text())
        assert (config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]) == (mean, std)
    other = recipe(shards, tmp_path / "other", tmp_path / "run", **few, **{"data.mean": [0.1, 0.1, 0.1]})
    with pytest.warns(MppWarning, match=r"data\.mean: the encoder was trained with \[0\.4, 0\.5, 0\.6\]; left out"):
        mpp.finetune(other)


def test_label_efficiency(shards: Path, run: Path, tmp_path: Path) -> None:
    """One run with several numbers of labels resumes trial by trial. Each trial equals that of a run of its own."""
    out, changes = tmp_path / "ft", {"optim.steps": 6, "data.labels_per_class": [12, 4]}
    whole = mpp.finetune(recipe(shards, out, run, **changes))
    assert [v.labels_per_class for v in whole.verdicts] == [4, 12]
    assert {p.name for p in out.iterdir() if p.is_dir()} == {
        f"labels{n}-{approach}-seed{seed}" for n in (4, 12) for approach in ("pretrained", "scratch") for seed in (0, 1)
    }
    assert whole.score == whole.verdicts[-1].score
    assert whole.encoder == out / "labels12-pretrained-seed0" / "encoder"
    lines = whole.table().splitlines()
    assert lines[0].split("   ")[0] == "labels a class"
    assert [line.split()[0] for line in lines[1:3]] == ["4", "12"]
    stored = json.loads((out / "result.json").read_text())
    assert [v["labels_per_class"] for v in stored["verdicts"]] == [4, 12]
    with Image.open(out / "label_efficiency.png") as plot:
        assert plot.format == "PNG"

    alone = mpp.finetune(recipe(shards, tmp_path / "alone", run, **{**changes, "data.labels_per_class": 4}))
    assert alone.verdicts[0] == whole.verdicts[0]
    assert alone.plot is None

    kept = out / "labels4-scratch-seed1" / "result.json"
    before = json.loads(kept.read_text())
    kept.write_text(json.dumps({**before, "metrics": {**before["metrics"], "accuracy": 0.25}}))
    shutil.rmtree(out / "labels12-scratch-seed1")
    again = mpp.finetune(recipe(shards, out, run, **changes), resume="auto")
    assert again.verdicts[0].score["scratch"].values[1] == 0.25, "a finished trial must not run again"
    assert again.verdicts[1] == whole.verdicts[1]
    more = mpp.finetune(recipe(shards, out, run, **changes, seeds=[0, 1, 2]), resume="auto")
    assert [e.values[:2] for e in more.verdicts[1].score.values()] == [
        e.values for e in whole.verdicts[1].score.values()
    ], "an extra seed must only add trials"


def test_the_exported_classifier_has_the_accuracy_that_was_reported(shards: Path, run: Path, tmp_path: Path) -> None:
    from mpp.data.labeled import open_labeled
    from mpp.data.labeled_sets import CentreDataset

    mpp.finetune(recipe(shards, tmp_path / "ft", run, seeds=[0], beside=[]))
    data = open_labeled(
        (str(shards / "shard-000000.tar"),), key="k", classes=None, cache_dir=None, cache_limit_bytes=1e9
    )
    batch = CentreDataset(
        data, (16, 16), 1.0, channels=3, formats=("JPEG", "PNG"), max_image_pixels=10**6
    ).__getitems__(list(range(25)))
    trial = tmp_path / "ft" / "pretrained-seed0"
    classifier = timm.create_model(f"local-dir:{trial / 'encoder'}", pretrained=True).eval()
    with torch.no_grad():
        guessed = classifier((batch.images.float() / 255 - 0.5) / 0.5).argmax(-1)
    accuracy = (guessed == batch.labels).float().mean().item()
    assert accuracy == pytest.approx(json.loads((trial / "result.json").read_text())["metrics"]["accuracy"], abs=1e-6)


def test_distilled_encoders_have_tokens_to_read_and_no_mean(shards: Path, tmp_path: Path) -> None:
    deit = {
        "name": "deit_tiny_distilled_patch16_224",
        "args": {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
    }
    changes = {"architecture": deit, "seeds": [0]}
    with pytest.raises(UserError, match="pool: mean: timm's distilled DeiTs read .*; use pool=token"):
        mpp.finetune(recipe(shards, tmp_path / "ft", "scratch", **changes))
    assert not (tmp_path / "ft").exists()
    mpp.finetune(recipe(shards, tmp_path / "ft", "scratch", **changes, **{"pool": "token", "optim.steps": 1}))


def test_the_approaches_differ_in_their_weights_alone(shards: Path, run: Path, tmp_path: Path) -> None:
    given = recipe(shards, tmp_path / "ft", run)
    pretrained, scratch = (build(given, approach, 0, 2) for approach in ("pretrained", "scratch"))
    assert [(n, p.shape) for n, p in pretrained.named_parameters()] == [
        (n, p.shape) for n, p in scratch.named_parameters()
    ]
    stored = mpp.load_encoder(run).state_dict()
    loaded = pretrained.encoder.state_dict()
    assert all(torch.equal(stored[k], loaded[k]) for k in stored)
    assert not torch.equal(scratch.encoder.state_dict()["blocks.0.attn.qkv.weight"], loaded["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.8, "cutmix": 1.0, "task.label_smoothing": 0.1},
        {"pool": "token", "drop_path_rate": 0.2, "task.tanh_dim": 8},
        {"data.auto_augment": "rand-m5", "data.color_jitter": 0.2, "data.erase": 0.5},
        {"data.labels_per_class": None, "data.fraction": 0.3, "optim.head_lr_scale": 5.0},
        {"data.image_size": 24, "optim.clip_grad_norm": 1.0},
        {
            "data.image_size": [16, 24],
            "optim.max_batch_per_device": 10,
            "optim.steps": None,
            "optim.epochs": 2,
        },
    ],
    ids=str,
)
def test_options(changes: dict[str, Any], shards: Path, run: Path, tmp_path: Path) -> None:
    base = {"seeds": [0], "beside": [], "optim.steps": 3}
    result = mpp.finetune(recipe(shards, tmp_path / "ft", run, **{**base, **changes}))
    assert 0 <= result.score["pretrained"].mean <= 1
    assert math.isfinite(read_metrics(tmp_path / "ft" / "pretrained-seed0")[-1]["loss"])
    assert mpp.verify(tmp_path / "ft" / "pretrained-seed0").difference <= 1e-5


def test_the_channels_are_the_encoder_s(shards: Path, run: Path, tmp_path: Path) -> None:
    """A grey encoder keeps its one channel. If the recipe names another number, it is used with a warning."""
    changes = {"seeds": [0], "beside": [], "optim.steps": 2}
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "grey", **{"data.channels": 1, "optim.steps": 2}))
    mpp.finetune(recipe(shards, tmp_path / "ft", tmp_path / "grey", **changes))
    assert load_recipe(tmp_path / "ft" / "recipe.yaml", FinetuneRecipe).data.channels == 1
    config = json.loads((tmp_path / "ft" / "pretrained-seed0" / "encoder" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [1, 16, 16]
    with pytest.warns(MppWarning, match=r"data\.channels: 1, but the encoder was trained with 3"):
        result = mpp.finetune(recipe(shards, tmp_path / "to_grey", run, **changes, **{"data.channels": 1}))
    assert mpp.verify(tmp_path / "to_grey" / "pretrained-seed0").difference <= 1e-5
    assert result.state == "finished"
    policy = {**changes, "data.auto_augment": "rand-m5"}
    with pytest.raises(UserError, match=r"data\.auto_augment: its policies are for 3 channels, of which data has 1"):
        mpp.finetune(recipe(shards, tmp_path / "none", tmp_path / "grey", **policy))


def test_positions_are_resized_when_the_image_size_differs(shards: Path, run: Path, tmp_path: Path) -> None:
    large = build(recipe(shards, tmp_path / "ft", run, **{"data.image_size": 32}), "pretrained", 0, 2)
    assert large.encoder.pos_embed.shape[1] == 1 + 64
    small = mpp.load_encoder(run).pos_embed
    assert torch.equal(large.encoder.pos_embed[:, 0], small[:, 0])
    correlation = torch.corrcoef(torch.stack([large.encoder.pos_embed[0, 1], small[0, 1]]))[0, 1]
    assert correlation > 0.5, "the position of a corner must stay about the same"


def test_other_encoders(shards: Path, run: Path, tmp_path: Path) -> None:
    mpp.export(run, tmp_path / "exported")
    one = {"seeds": [0], "optim.steps": 2}
    mpp.finetune(recipe(shards, tmp_path / "a", tmp_path / "exported", **one, beside=[]))
    scratch = mpp.finetune(
        recipe(
            shards,
            tmp_path / "b",
            "scratch",
            **one,
            architecture={"name": "vit_tiny_patch16_224", "args": ARGS},
        )
    )
    assert scratch.score.keys() == {"scratch"}
    assert scratch.gain is None
    with pytest.raises(UserError, match="neither a run nor an exported encoder"):
        mpp.finetune(recipe(shards, tmp_path / "c", tmp_path))
    with pytest.raises(
        UserError, match=r"encoder: 'vit_tiny_patch16_22': no such folder.* Did you mean vit_tiny_patch16_224"
    ):
        mpp.finetune(recipe(shards, tmp_path / "c", "vit_tiny_patch16_22"))
    with pytest.raises(UserError, match=r"architecture\.name: .*has no model 'vit_tin'"):
        mpp.finetune(recipe(shards, tmp_path / "c", "scratch", architecture={"name": "vit_tin"}))
    with pytest.raises(UserError, match="pool: token: ResNet has no class token here; use pool=mean"):
        mpp.finetune(recipe(shards, tmp_path / "c", "scratch", architecture={"name": "resnet18"}, pool="token"))
    with pytest.raises(UserError, match=r"architecture\.name: only with encoder: scratch"):
        mpp.finetune(recipe(shards, tmp_path / "e", run, architecture={"name": "vit_tiny_patch16_224"}))
    with pytest.raises(UserError, match="mixup: needs an even number"):
        mpp.finetune(recipe(shards, tmp_path / "d", run, **{"mixup": 0.5, "optim.global_batch_size": 9}))


@pytest.mark.slow
def test_kill_9_and_resume_is_bit_equal(shards: Path, run: Path, tmp_path: Path) -> None:
    changes = {"drop_path_rate": 0.2, "mixup": 0.8, "data.erase": 0.3, "seeds": [0], "optim.steps": 60}
    changes |= {"ema_decay": 0.9, "head_init": "probe", "unlabeled": {"images": str(shards), "kind": "mixmatch"}}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values(shards, tmp_path / "whole", run, **changes)))
    mpp.finetune(path)
    trials = [tmp_path / "killed" / f"{approach}-seed0" / "metrics.jsonl" for approach in ("pretrained", "scratch")]
    for trial in trials:
        process = subprocess.Popen(
            [sys.executable, "-m", "mpp", "finetune", str(path), f"out={tmp_path / 'killed'}", "--resume", "auto"],
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not (trial.exists() and len(trial.read_text().splitlines()) > 10):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = mpp.finetune(path, resume="auto", out=str(tmp_path / "killed"))
    assert result.state == "finished"
    for approach in ("pretrained", "scratch"):
        a, b = (
            [m["loss"].hex() for m in read_metrics(tmp_path / o / f"{approach}-seed0")] for o in ("whole", "killed")
        )
        assert a == b
    both = [json.loads((tmp_path / o / "result.json").read_text())["score"] for o in ("whole", "killed")]
    assert both[0] == both[1]


@pytest.mark.parametrize("unlabeled", ["", "fixmatch", "mixmatch"])
def test_two_processes_train_the_same_run_as_one(unlabeled: str, shards: Path, run: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"seeds": [0], "optim.steps": 10, "beside": []}
    if unlabeled:  # no erasing: it is drawn for each micro-batch
        settings = {"images": str(shards), "kind": unlabeled, "start": 0.2, "threshold": 0.5, "erase": 0.0}
        changes |= {"ema_decay": 0.9, "unlabeled": settings}
    if unlabeled == "fixmatch":
        cnn = {"args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}}
        changes |= {"beside": ["cnn"], "cnn": cnn}  # both processes together measure the length of the cnn run
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values(shards, tmp_path / "one", run, **changes)))
    mpp.finetune(path)
    done = command("finetune", path, f"out={tmp_path / 'two'}", processes=2)
    assert done.returncode == 0, done.stderr
    a, b = ([m["loss"] for m in read_metrics(tmp_path / o / "pretrained-seed0")] for o in ("one", "two"))
    assert a == pytest.approx(b, rel=1e-5)
    results = [json.loads((tmp_path / o / "result.json").read_text())["score"] for o in ("one", "two")]
    assert results[0]["pretrained"] == results[1]["pretrained"], "every validation image must be counted once"
    assert results[0].keys() == results[1].keys()


def test_what_is_refused_before_the_run_folder_is_made(shards: Path, run: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"data.labels_per_class": 1000}, "data.labels_per_class: 1000, but class"),
        ({"mixup": 0.5, "optim.global_batch_size": 9}, "mixup: needs an even number"),
        ({"data.auto_augment": "foo"}, "data.auto_augment: timm has no policy 'foo'"),
        ({"task.tanh_dim": 0}, "task.tanh_dim: must be >= 1"),
        (
            {"data.image_size": 18},
            r"data.image_size: the encoder has a stride of 4 px; expected multiples of it, got 18×18",
        ),
        ({"drop_path_rate": 1.0}, "drop_path_rate: must be "),
    ):
        with pytest.raises(UserError, match=message):
            mpp.finetune(recipe(shards, tmp_path / "ft", run, **changes))
        assert not (tmp_path / "ft").exists()


def test_one_class_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "disc").mkdir(parents=True)
    (tmp_path / "images" / "disc" / "0.png").write_bytes(encoded(drawn_image(0)))
    with pytest.raises(UserError, match=r"data\.train: only one class \(disc\)"):
        mpp.finetune(
            recipe(
                tmp_path / "images",
                tmp_path / "ft",
                run,
                **{"data.train": str(tmp_path / "images"), "data.val": str(tmp_path / "images")},
            )
        )


def test_validating_on_the_training_images_is_warned_of(shards: Path, run: Path, tmp_path: Path) -> None:
    both = {"data.train": str(shards), "data.val": str(shards)}
    with pytest.warns(MppWarning, match="the same images as data.train"):
        mpp.finetune(recipe(shards, tmp_path / "ft", run, **both, **{"seeds": [0], "optim.steps": 1, "beside": []}))


def test_a_damaged_encoder_is_not_trained_on(shards: Path, run: Path, tmp_path: Path) -> None:
    mpp.export(run, tmp_path / "e")
    data = bytearray((tmp_path / "e" / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "e" / "model.safetensors").write_bytes(data)
    for use in (
        mpp.load_encoder,
        lambda e: mpp.finetune(recipe(shards, tmp_path / "ft", e)),
        lambda e: mpp.export(e, tmp_path / "f"),
    ):
        with pytest.raises(UserError, match=r"e/model\.safetensors: does not match the checksum"):
            use(tmp_path / "e")
    assert not (tmp_path / "ft").exists()


@pytest.mark.filterwarnings("ignore:.*are also in data.train:mpp.errors.MppWarning")
def test_finished_trials_are_not_mixed_with_other_data(
    image_folder: Path, shards: Path, run: Path, tmp_path: Path
) -> None:
    val = tmp_path / "val"
    shutil.copytree(image_folder, val)
    changes = {"seeds": [0], "optim.steps": 2, "data.val": str(val)}
    leaking = pytest.warns(MppWarning, match=r"\d+ of \d+ images are also in data.train, such as .*val/disc/000.png")
    with leaking:
        mpp.finetune(recipe(shards, tmp_path / "ft", run, **changes))
    (val / "disc" / "002.jpg").unlink()
    trial = tmp_path / "ft" / "pretrained-seed0"
    for lost, refused in (
        (None, f"{tmp_path}/ft: the data changed since"),
        (tmp_path / "ft" / "data.json", f"{trial}: the data or the encoder changed since"),
        (trial / "result.json", f"{trial}/checkpoints/step-00000002: the training data or the encoder changed since"),
    ):
        if lost:
            lost.unlink()  # the next record that names the data refuses it
        with pytest.raises(UserError, match=refused):
            mpp.finetune(recipe(shards, tmp_path / "ft", run, **changes), resume="auto")


def test_the_export_says_how_it_was_evaluated(shards: Path, run: Path, tmp_path: Path) -> None:
    changes = {"seeds": [0], "optim.steps": 2, "beside": [], "data.val_crop_fraction": 0.75}
    mpp.finetune(recipe(shards, tmp_path / "ft", run, **changes))
    config = json.loads((tmp_path / "ft" / "pretrained-seed0" / "encoder" / "config.json").read_text())
    assert config["pretrained_cfg"]["crop_pct"] == 0.75
    with pytest.raises(UserError, match="a fine-tuning run of several models; name one, such as .*pretrained-seed0"):
        mpp.export(tmp_path / "ft", tmp_path / "o")


STEADY = {
    "plain": {},
    "accumulated and averaged": {"optim.max_batch_per_device": 5, "ema_decay": 0.9},
    "mixed, thawing": {"mixup": 0.4, "frozen": 0.5, "optim.clip_grad_norm": 1.0},
    "unlabeled images": {"ema_decay": 0.9, "mixup": 0.4},
    "unlabeled images, mixed": {"ema_decay": 0.9, "mixup": 0.4},
    "batch norms": {"encoder": "scratch", "architecture": {"name": "resnet10t"}, "data.image_size": 32},
}


@pytest.mark.parametrize("name", STEADY)
def test_a_steady_step_asks_the_device_for_nothing(
    name: str, shards: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"seeds": [0], "beside": [], "optim.steps": 6, "max_skipped_steps": 3}
    changes |= {"log_every_steps": 100, "checkpoint_every_steps": 100, "data.workers": 1, **STEADY[name]}
    if "unlabeled images" in name:
        kind = "mixmatch" if "mixed" in name else "fixmatch"
        changes |= {"unlabeled": {"images": str(shards), "threshold": 0.5, "kind": kind}}
        monkeypatch.setattr(Taught, "keep_sure", lambda taught, strong: (strong, taught))  # runs on CPUs only
    given = recipe(shards, tmp_path / "ft", changes.pop("encoder", run), **changes)
    check_steady_steps(monkeypatch, lambda: mpp.finetune(given))


def test_a_line_of_metrics_says_how_long_batches_took(shards: Path, run: Path, tmp_path: Path) -> None:
    mpp.finetune(recipe(shards, tmp_path / "ft", run, seeds=[0], beside=[], **{"optim.steps": 3}))
    for line in read_metrics(tmp_path / "ft" / "pretrained-seed0"):
        assert 0 <= line["data_wait"] < 1
        assert line["images_per_s"] > 0
