"""The training loop: golden losses, bit-exact resume, several processes, signals and faults."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mpp
from mpp.errors import UserError
from mpp.pretraining.monitor import OnlineProbe
from mpp.pretraining.setup import prepare
from mpp.runs.records import read_metrics
from mpp.training.batch_norms import batch_norms_of, measure_batch_norms
from tests.conftest import ROOT, command, drawn_image, encoded, pretrain_recipe
from tests.data.test_loader import shard_of
from tests.synchronisations import check_steady_steps

GOLDEN = ROOT / "tests" / "golden.json"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "token, linear": {},
    "joining at 1, half predicted": {"corruption.enter": 1, "predict_fraction": 0.5, "mask.name": "block"},
    "drop, transformer, pixels": {
        "corruption.name": "drop",
        "head.name": "transformer",
        "target.name": "pixels",
    },
    "drop, cross_attention": {"corruption.name": "drop", "head.name": "cross_attention", "mask.ratio": 0.75},
    "bert, three targets": {
        "corruption.name": "bert",
        "target.name": "mean_color",
        "extra_targets": [{"target": "downsized_color", "weight": 0.5}, {"target": "pixels", "head": "mlp"}],
    },
    "hog, a range of ratios": {"target.name": "hog", "mask.ratio": [0.3, 0.7], "loss.name": "smooth_l1"},
    "moving teacher, attention mask": {
        "target": {"name": "ema_teacher", "layers": 2, "decay": 0.9},
        "mask": {
            "name": "attention",
            "teacher": "vit_tiny_patch16_224",
            "pretrained": False,
            "args": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
        },
    },
    "moving teacher, three masks": {
        "target": {"name": "ema_teacher", "decay": 0.9},
        "mask": {"name": "complementary", "ratio": 0.7},
        "masks_per_image": 3,
        "corruption.name": "drop",
        "head.name": "cross_attention",
    },
    "clusters, inverse blocks": {
        "target": {"name": "clusters", "clusters": 16, "decay": 0.9},
        "mask": {"name": "inverse_block", "ratio": 0.6, "roll": True},
        "corruption.name": "drop",
        "head.name": "cross_attention",
        "optim.max_batch_per_device": 8,  # clusters are balanced in a micro-batch, so two processes have those of one
    },
    "agreement of two views": {
        "agreement": {"views": 2, "dim": 8, "hidden_dim": 32, "weight": 0.3},
        "data.color_jitter": 0.4,
        "data.grayscale": 0.2,
        "corruption.name": "drop",
        "head.name": "transformer",
        "optim.max_batch_per_device": 8,  # SIGReg judges a micro-batch, so two processes have those of one
    },
}


def losses(out: Path) -> list[float]:
    return [m["loss"] for m in read_metrics(out)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_golden_losses(objective: str, shards: Path, tmp_path: Path) -> None:
    """A refactoring must not change these losses. MPP_RECORD_GOLDEN=1 records them again."""
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **OBJECTIVES[objective]))
    found = losses(tmp_path / "run")
    assert len(found) == 20
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("MPP_RECORD_GOLDEN"):
        GOLDEN.write_text(json.dumps({**golden, objective: found}, indent=1) + "\n")
        return
    # bit-equal on one machine, but another CPU's kernels round differently
    np.testing.assert_allclose(found, golden[objective], rtol=1e-4)
    assert min(found[-5:]) < 0.96 * found[0], "the loss must fall"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bf16_trains_the_same_within_its_precision(objective: str, shards: Path, tmp_path: Path) -> None:
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **OBJECTIVES[objective], precision="bf16"))
    golden = json.loads(GOLDEN.read_text())[objective]
    np.testing.assert_allclose(losses(tmp_path / "run"), golden, rtol=0.03)


def test_what_a_run_leaves(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = mpp.pretrain(pretrain_recipe(shards, out))
    assert (result.state, result.step) == ("finished", 20)
    assert {p.name for p in out.iterdir()} == {
        "recipe.yaml", "env.json", "metrics.jsonl", "train.log", "checkpoints", "encoder", "status.json",
        "reconstructions", "data.json", ".lock",
    }  # fmt: skip
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    last = read_metrics(out)[-1]
    keys = {"step", "seen", "loss", "skill", "lr", "grad_norm", "images_per_s", "data_wait", "skipped_images"}
    keys |= {"cpu_minutes"}
    assert last.keys() == keys
    assert last["seen"] == 20 * 16
    assert 0 < last["skill"] < 1
    assert last["skill"] == result.skill
    assert 0 <= last["data_wait"] <= 1
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000015", "step-00000020"]
    assert mpp.load_encoder(out)(torch.zeros(1, 3, 16, 16)).shape == (1, 32)


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param("joining at 1, half predicted", marks=pytest.mark.slow),
        pytest.param("drop, cross_attention", marks=pytest.mark.exhaustive),
        pytest.param("bert, three targets", marks=pytest.mark.exhaustive),
        pytest.param("agreement of two views", marks=pytest.mark.exhaustive),
    ],
)
def test_compiled_it_trains_the_same(objective: str, shards: Path, tmp_path: Path) -> None:
    changes = {"compile": True, "skill_every_steps": 2, "checkpoint_every_steps": 3}
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **OBJECTIVES[objective], **changes))
    np.testing.assert_allclose(losses(tmp_path / "run"), json.loads(GOLDEN.read_text())[objective], rtol=1e-4)


def test_where_nothing_compiles_it_is_said(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    # torch's own patch, because undoing pytest's would delete the key for the rest of the process
    refused = r"^compile: torch cannot compile on this machine \(.+\); use compile=false$"
    with torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",)), pytest.raises(UserError, match=refused):
        mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", compile=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_steady_step_asks_the_device_for_nothing(
    objective: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pretrain_recipe(
        shards,
        tmp_path / "run",
        **OBJECTIVES[objective],
        **{"log_every_steps": 100, "skill_every_steps": 100, "checkpoint_every_steps": 100, "data.workers": 1},
        **{"optim.steps": 6, "reconstruct_images": 0, "max_skipped_steps": 3},
    )
    check_steady_steps(monkeypatch, lambda: mpp.pretrain(recipe))


def test_batch_norms_of_the_encoder_have_the_statistics_of_whole_images(shards: Path, tmp_path: Path) -> None:
    resnet = {"encoder": {"name": "resnet10t"}, "corruption": "zeros", "mask.unit_px": 32, "data.image_size": 64}
    made = pretrain_recipe(shards, tmp_path / "run", **resnet, **{"optim.steps": 3, "data.held_out": 30})
    encoder = mpp.load_encoder(mpp.pretrain(made).out)
    exported = {k: v.clone() for k, v in encoder.state_dict().items()}
    with ExitStack() as until_the_end:
        job = prepare(made, "auto", until_the_end)
        whole = job.model.images(job.held_out.images).normalised
    learned = job.model.encoder.model.state_dict()
    measure_batch_norms(encoder, batch_norms_of(encoder), [whole])
    for name, value in encoder.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, exported[name], rtol=1e-3, atol=1e-4)
            assert not torch.allclose(value, learned[name], rtol=0.01)
        elif "num_batches" not in name:
            assert torch.equal(value, learned[name])


def test_what_a_run_of_several_targets_logs(shards: Path, tmp_path: Path) -> None:
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **OBJECTIVES["bert, three targets"]))
    last = read_metrics(tmp_path / "run")[-1]
    names = ["mean_color", "downsized_color", "pixels"]
    parts = [last[f"loss_{n}"] for n in names]
    assert last["loss"] == pytest.approx(parts[0] + 0.5 * parts[1] + parts[2])
    assert last["skill"] == last["skill_mean_color"]
    assert all(-1 < last[f"skill_{n}"] < 1 for n in names)


def test_muon_resumes_to_the_last_bit(shards: Path, tmp_path: Path) -> None:
    recipe = pretrain_recipe(shards, tmp_path / "a", **{"optim.name": "muon"})
    mpp.pretrain(recipe)
    branch = mpp.pretrain(recipe, out=str(tmp_path / "b"), resume=str(tmp_path / "a" / "checkpoints" / "step-00000015"))
    found = losses(tmp_path / "a")
    assert [x.hex() for x in losses(branch.out)] == [x.hex() for x in found[15:]]
    assert found != json.loads(GOLDEN.read_text())["token, linear"]
    assert min(found[-5:]) < 0.96 * found[0]


def test_averaged_weights_are_exported_and_probed(
    shards: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, probed = "blocks.1.mlp.fc1.weight", []
    plain = OnlineProbe.__call__

    def note(self: OnlineProbe, model: nn.Module, device: torch.device) -> Any:
        probed.append(model.get_parameter(name).detach().clone())
        return plain(self, model, device)

    monkeypatch.setattr(OnlineProbe, "__call__", note)
    probe = {"train": str(image_folder), "val": str(image_folder), "every_steps": 20}
    every_step = {"checkpoint_every_steps": 1, "keep_checkpoints": 30}
    every_step |= {"optim.schedule": "constant"}  # at a rate that falls to 0 the average would be the last weights
    recipe = pretrain_recipe(shards, tmp_path / "a", **every_step, probe=probe, ema_decay=0.6)
    with ExitStack() as opened:
        unaltered = prepare(recipe.model_copy(update={"out": str(tmp_path / "start")}), "never", opened)
        average = unaltered.model.encoder.model.get_parameter(name).detach().clone()
    result = mpp.pretrain(recipe)
    without = mpp.pretrain(recipe.model_copy(update={"out": str(tmp_path / "without"), "ema_decay": None}))
    assert losses(result.out) == losses(without.out), "the average must not change training"
    checkpoints = sorted((result.out / "checkpoints").iterdir())
    for step, folder in enumerate(checkpoints, start=1):
        decay = min(0.6, (1 + step) / (10 + step))
        latest = load_file(folder / "model.safetensors")[f"encoder.model.{name}"]
        average = decay * average + (1 - decay) * latest
    assert step == 20
    exported = result.out / "encoder" / "model.safetensors"
    torch.testing.assert_close(load_file(exported)[name], average)
    torch.testing.assert_close(probed[0], average)
    assert (latest - average).abs().max() > 1e-3, "the last weights must differ"
    branch = mpp.pretrain(recipe, out=str(tmp_path / "b"), resume=str(checkpoints[6]))
    assert (branch.out / "encoder" / "model.safetensors").read_bytes() == exported.read_bytes()


def test_muon_refuses_parts_of_matrices() -> None:
    with pytest.raises(UserError, match="optim.name: muon needs whole matrices, which fsdp: true divides; use adamw"):
        pretrain_recipe("none", "none", **{"optim.name": "muon", "fsdp": True})


@pytest.mark.parametrize(
    ("objective", "target"),
    [("moving teacher, attention mask", "ema_teacher"), ("clusters, inverse blocks", "clusters")],
)
def test_a_moving_teacher_resumes_to_the_last_bit_and_logs_its_rank(
    objective: str, target: str, shards: Path, tmp_path: Path
) -> None:
    recipe = pretrain_recipe(shards, tmp_path / "a", **OBJECTIVES[objective])
    mpp.pretrain(recipe)
    branch = mpp.pretrain(recipe, out=str(tmp_path / "b"), resume=str(tmp_path / "a" / "checkpoints" / "step-00000015"))
    assert [x.hex() for x in losses(branch.out)] == [x.hex() for x in losses(tmp_path / "a")[15:]]
    for name in ("model", "optimizer"):
        one, other = (
            (tmp_path / r / "checkpoints" / "step-00000020" / f"{name}.safetensors").read_bytes() for r in "ab"
        )
        assert one == other
    last = read_metrics(tmp_path / "a")[-1]
    assert last[f"target_rank_{target}"] > 2
    assert 0.1 < last[f"target_share_{target}"] < 1
    assert "collapses" not in (tmp_path / "a" / "train.log").read_text()


def test_a_collapsing_teacher_is_said(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning also appears if the features are a constant plus a little noise, whose rank is high."""
    from mpp.encoders.teacher import FrozenTeacher

    plain = FrozenTeacher.forward
    monkeypatch.setattr(FrozenTeacher, "forward", lambda self, *a: 0.1 * plain(self, *a) + torch.arange(32.0) / 16)
    result = mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **{"target.name": "ema_teacher"}))
    said = (result.out / "train.log").read_text()
    assert "warning: target ema_teacher collapses: 0." in said
    last = read_metrics(result.out)[-1]
    assert last["target_rank_ema_teacher"] > 1
    assert last["target_share_ema_teacher"] < 0.01
    assert last["skill"] < 0.9, "the trivial prediction is also this constant"


def test_images_of_one_colour_are_said(tmp_path: Path) -> None:
    from PIL import Image

    grey = [encoded(Image.new("RGB", (24, 24), (90, 90, 90)), "PNG") for _ in range(40)]
    path = shard_of(tmp_path / "s.tar", grey)
    result = mpp.pretrain(pretrain_recipe(path, tmp_path / "run", **{"target.name": "mean_color", "optim.steps": 1}))
    assert "warning: target mean_color: its classes carry 0.00 bits" in (result.out / "train.log").read_text()


def test_accumulation_gives_the_same_losses(shards: Path, tmp_path: Path) -> None:
    found = []
    for most in (16, 4):
        out = tmp_path / str(most)
        mpp.pretrain(pretrain_recipe(shards, out, **{"optim.max_batch_per_device": most}))
        found.append(losses(out))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("objective", "optimizer"),
    [
        ("token, linear", "adamw"),
        pytest.param("token, linear", "muon", marks=pytest.mark.slow),
        pytest.param("moving teacher, attention mask", "adamw", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_the_same_run_as_one(
    recipe_file: Callable[..., Path], tmp_path: Path, objective: str, optimizer: str
) -> None:
    path = recipe_file(**{"data.workers": 1, "optim.name": optimizer, **OBJECTIVES[objective]})
    done = command("pretrain", path, f"out={tmp_path / 'two'}", processes=2)
    assert done.returncode == 0, done.stderr
    alone = command("pretrain", path, f"out={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    skills = [read_metrics(tmp_path / n)[-1]["skill"] for n in ("one", "two")]
    assert skills[0] == pytest.approx(skills[1], rel=1e-4)
    assert done.stdout.count("images in 3 shards") == 1, "only the main process may print"
    env = json.loads((tmp_path / "two" / "env.json").read_text())
    assert env["processes"] == 2


def start(path: Path, *overrides: str, resume: str = "never") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mpp", "pretrain", str(path), *overrides, "--resume", resume],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"ended before step {step}: {process.communicate()[0]}")
        path = out / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


SLOW = {"ema_decay": 0.9, "optim.steps": 120, "checkpoint_every_steps": 7, "encoder.args.drop_path_rate": 0.2}


@pytest.mark.slow
def test_kill_9_and_resume_is_bit_equal(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe_file(**SLOW)
    whole = command("pretrain", path, f"out={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    for step in (10, 40):  # killed twice, the second time with another number of workers, before it may finish
        process = start(path, f"out={out}", f"data.workers={step // 40}", resume="auto")
        wait_for_step(out, step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert json.loads((out / "status.json").read_text())["state"] == "running"
    done = command("pretrain", path, f"out={out}", "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    assert [x.hex() for x in losses(out)] == [x.hex() for x in losses(tmp_path / "whole")]
    weights = [(o / "encoder" / "model.safetensors").read_bytes() for o in (out, tmp_path / "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_ends_as_it_would(
    number: signal.Signals, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    path, out = (
        recipe_file(**{**SLOW, "optim.steps": 5000, "checkpoint_every_steps": 10000}),
        tmp_path / "run",
    )
    process = start(path)
    wait_for_step(out, 3, process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, said
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["why"]) == ("stopped", number.name)
    assert (out / "checkpoints" / f"step-{status['step']:08d}").is_dir()
    assert "--resume auto" in said
    with pytest.raises(UserError, match="has not written its encoder yet; finish it with --resume auto"):
        mpp.load_encoder(out)


def test_a_signal_to_every_process_of_a_job_saves(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """Schedulers send the signal to every process, the loader's workers included."""
    path, out = recipe_file(**{**SLOW, "optim.steps": 5000, "data.workers": 2}), tmp_path / "run"
    process = start(path)
    wait_for_step(out, 3, process)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143, said
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"


def test_images_in_a_format_that_is_not_read(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not one of 12 held-out images can be read; the first: .*shard-00000"):
        mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **{"data.formats": ["GIF"]}))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_without_checkpoints_is_not_begun_again(shards: Path, tmp_path: Path) -> None:
    recipe = pretrain_recipe(shards, tmp_path / "run", **{"optim.steps": 2})
    mpp.pretrain(recipe)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="has its encoder but no checkpoint to continue from"):
        mpp.pretrain(recipe, resume="auto")
    with pytest.raises(UserError, match="--resume: expected auto, never, or the folder of a checkpoint; got True"):
        mpp.pretrain(recipe, resume=True)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_resumes_on_two_processes(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    path, out = recipe_file(**{"optim.steps": 40}), tmp_path / "run"
    mpp.pretrain(path, out=str(tmp_path / "whole"))
    process = start(path, "optim.steps=40")
    wait_for_step(out, 12, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    done = command("pretrain", path, "--resume", "auto", processes=2)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(out), losses(tmp_path / "whole"), rtol=1e-5)


def test_resuming_a_finished_run_changes_nothing(shards: Path, tmp_path: Path) -> None:
    recipe = pretrain_recipe(shards, tmp_path / "run")
    first = mpp.pretrain(recipe)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = mpp.pretrain(recipe, resume="auto")
    assert (again.state, again.step, again.skill, again.loss) == ("finished", 20, first.skill, first.loss)
    assert json.loads((again.encoder / "export.json").read_text())["metrics"]["loss"] == first.loss
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert "which is the last: nothing is left to do" in (tmp_path / "run" / "train.log").read_text()
    as_run = (tmp_path / "run" / "recipe.yaml").read_text()
    mpp.pretrain(recipe, resume="auto", log_every_steps=3)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == as_run, "the recipe of the run must stay on record"


@pytest.mark.parametrize("schedule", ["wsd", "constant"])
def test_a_finished_run_is_made_longer_as_if_it_had_been_so_from_the_start(
    schedule: str, shards: Path, tmp_path: Path
) -> None:
    recipe = pretrain_recipe(shards, tmp_path / "run", **{"optim.schedule": schedule, "checkpoint_every_steps": 7})
    longer = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"steps": 30})})
    whole = mpp.pretrain(longer.model_copy(update={"out": str(tmp_path / "whole")}))
    assert mpp.pretrain(recipe).step == 20
    later = tmp_path / "run" / "reconstructions" / "step-00000019.png"
    later.parent.mkdir(exist_ok=True)
    later.touch()
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    ended = mpp.pretrain(longer, resume="auto")
    assert (ended.state, ended.step, ended.loss, ended.skill) == ("finished", 30, whole.loss, whole.skill)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    weights = [(tmp_path / name / "encoder" / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]
    assert (tmp_path / "run" / "encoder-step-00000020" / "model.safetensors").exists(), "of the shorter run"
    assert later.exists() == (schedule == "constant"), "a picture of weights that the longer run never has"

    # killed as soon as the longer recipe was on record, with the checkpoint of the shorter run's end still there
    shutil.copy(tmp_path / "run" / "recipe.yaml", tmp_path / "killed" / "recipe.yaml")
    mpp.pretrain(longer.model_copy(update={"out": str(tmp_path / "killed")}), resume="auto")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_what_cannot_be_made_longer(shards: Path, tmp_path: Path) -> None:
    for schedule, steps in (("cosine", 30), ("wsd", 10)):
        recipe = pretrain_recipe(shards, tmp_path / schedule, **{"optim.schedule": schedule})
        mpp.pretrain(recipe)
        with pytest.raises(UserError, match=f"optim.steps: was 20, now {steps}"):
            mpp.pretrain(recipe, resume="auto", **{"optim.steps": steps})
    folder = tmp_path / "wsd" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000015", "step-00000016", "step-00000020"]
    with pytest.raises(UserError, match="step-00000020: the learning rate had fallen by then; a longer run needs an e"):
        mpp.pretrain(recipe, resume=str(folder / "step-00000020"), **{"optim.steps": 30})
    for step in ("step-00000015", "step-00000016"):
        shutil.rmtree(folder / step)
    with pytest.raises(
        UserError, match="step-00000020: the learning rate of the shorter run had fallen by then, and t"
    ):
        mpp.pretrain(recipe, resume="auto", **{"optim.steps": 30})
    assert mpp.pretrain(recipe, resume="auto").state == "finished", "the run itself is as it was"


def test_shards_may_lie_elsewhere_when_a_run_goes_on(shards: Path, tmp_path: Path) -> None:
    """The fingerprint depends on the content of the shards, so other data are refused."""
    whole = mpp.pretrain(pretrain_recipe(shards, tmp_path / "whole"))
    recipe = pretrain_recipe(shards, tmp_path / "run")
    mpp.pretrain(recipe)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")  # as if the run had been killed before
    (tmp_path / "run" / "status.json").unlink()
    shutil.copytree(shards, tmp_path / "moved")
    again = mpp.pretrain(recipe, resume="auto", **{"data.shards": str(tmp_path / "moved")})
    assert (again.state, again.loss, again.skill) == ("finished", whole.loss, whole.skill)
    (tmp_path / "moved" / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match=r"the data changed since"):
        mpp.pretrain(recipe, resume="auto", **{"data.shards": f"{tmp_path}/moved/*.tar"})


def test_who_may_write_into_a_run_folder(shards: Path, tmp_path: Path) -> None:
    recipe = pretrain_recipe(shards, tmp_path / "run")
    mpp.pretrain(recipe)
    with pytest.raises(UserError, match="is not empty; continue its run with --resume auto"):
        mpp.pretrain(recipe)
    with pytest.raises(
        UserError, match=r"(?s)a different recipe.*mask.ratio: was 0.6, now 0.3\n  optim.steps: was 20, now 30"
    ):
        mpp.pretrain(recipe, resume="auto", **{"mask.ratio": 0.3, "optim.steps": 30})
    mpp.pretrain(recipe, resume="auto", **{"log_every_steps": 3, "data.workers": 1})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not a run folder"):
        mpp.pretrain(recipe, resume="auto", out=str(tmp_path / "mine"))
    older = str(tmp_path / "run" / "checkpoints" / "step-00000015")
    with pytest.raises(UserError, match=r"(?s)a different recipe.*seed: was 0, now 1"):
        mpp.pretrain(recipe, resume=older, out=str(tmp_path / "new"), seed=1)
    with pytest.raises(UserError, match=r"--resume .*none: no such checkpoint; expected auto"):
        mpp.pretrain(recipe, resume=str(tmp_path / "none"), out=str(tmp_path / "new"))


def test_from_a_checkpoint_of_another_folder(shards: Path, tmp_path: Path) -> None:
    recipe = pretrain_recipe(shards, tmp_path / "a")
    mpp.pretrain(recipe)
    branch = mpp.pretrain(recipe, out=str(tmp_path / "b"), resume=str(tmp_path / "a" / "checkpoints" / "step-00000015"))
    assert [x.hex() for x in losses(branch.out)] == [x.hex() for x in losses(tmp_path / "a")[15:]]


def test_data_that_changed_are_refused(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "s.tar", [encoded(drawn_image(i), "JPEG") for i in range(40)])
    recipe = pretrain_recipe(path, tmp_path / "run")
    mpp.pretrain(recipe)
    shard_of(path, [encoded(drawn_image(i), "JPEG") for i in range(41)])
    with pytest.raises(UserError, match=f"{tmp_path}/run: the data changed since"):
        mpp.pretrain(recipe, resume="auto")
    (tmp_path / "run" / "data.json").unlink()  # each checkpoint also records the data
    with pytest.raises(UserError, match=r"step-00000020: the data changed since \(shards, their sizes"):
        mpp.pretrain(recipe, resume="auto")


def test_a_diverging_run_stops_before_the_update_and_names_the_batch(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"step \d+: loss .*stopped before the update. `mpp replay"):
        mpp.pretrain(pretrain_recipe(shards, out, **{"optim.base_lr": 1e20, "optim.warmup_steps": 0}))
    named = json.loads(next(out.glob("non-finite/step-*/rank0.json")).read_text())
    assert len(named["samples"][0]) == 16
    assert "shard-00000" in named["samples"][0][0]
    assert json.loads((out / "status.json").read_text())["state"] == "failed"


def test_unreadable_images_are_counted_and_stop_the_run_above_the_limit(tmp_path: Path) -> None:
    images = [encoded(drawn_image(i), "JPEG") if i % 5 else b"bad" for i in range(40)]
    path = shard_of(tmp_path / "s.tar", images)
    result = mpp.pretrain(pretrain_recipe(path, tmp_path / "few"))
    assert 10 < read_metrics(result.out)[-1]["skipped_images"] < 20 * 16
    at_15 = result.out / "checkpoints" / "step-00000015"
    resumed = mpp.pretrain(pretrain_recipe(path, tmp_path / "few"), out=str(tmp_path / "resumed"), resume=str(at_15))
    assert read_metrics(resumed.out)[-1]["skipped_images"] == read_metrics(result.out)[-1]["skipped_images"]
    log = (result.out / "train.log").read_text()
    assert "1 unreadable images so far" in log or "unreadable images so far, replaced" in log
    assert "s.tar: image-5.jpg: not an image" in log
    with pytest.raises(UserError, match=r"data\.max_bad_fraction: \d+ of \d+ images could not be read, more than 10"):
        mpp.pretrain(pretrain_recipe(path, tmp_path / "many", **{"optim.steps": 200, "data.max_bad_fraction": 0.1}))
    mpp.pretrain(pretrain_recipe(path, tmp_path / "allowed", **{"optim.steps": 60, "data.max_bad_fraction": 0.9}))


def test_skill_is_measured_on_images_that_are_never_trained_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpp.data.shards.reader import ShardImages

    trained, held = set(), set()
    load = ShardImages.load

    def spy(self: ShardImages, shard: int, row: int, rows: range, *words: Any, **options: Any) -> Any:
        # held-out images are centre crops, which `batch(centre=True)` reads with few=True
        (held if options["few"] else trained).add((shard, row))
        return load(self, shard, row, rows, *words, **options)

    monkeypatch.setattr(ShardImages, "load", spy)
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run"))
    assert len(held) == 12
    assert len(trained) >= 40
    assert not held & trained


def test_an_untrained_model_has_no_skill(shards: Path, tmp_path: Path) -> None:
    result = mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **{"optim.steps": 1, "optim.base_lr": 1e-9}))
    assert result.skill < 0.05
    assert math.isfinite(result.skill)


@pytest.mark.slow
def test_wrong_numbers_of_processes_are_refused(recipe_file: Callable[..., Path]) -> None:
    done = command("pretrain", recipe_file(**{"optim.global_batch_size": 15}), processes=2)
    assert done.returncode != 0
    assert "optim.global_batch_size: 15 cannot be divided among 2 processes; expected a multiple of 2" in done.stderr


@pytest.mark.parametrize(
    ("fsdp", "processes"), [(False, 1), pytest.param(True, 2, marks=pytest.mark.slow)], ids=["one process", "FSDP"]
)
def test_only_the_last_blocks_are_trained(
    fsdp: bool, processes: int, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    first = recipe_file(**{"optim.steps": 2})
    assert command("pretrain", first, f"out={tmp_path / 'first'}").returncode == 0
    begun = recipe_file(
        **{"encoder": {"name": str(tmp_path / "first"), "free_blocks": 1}, "optim.steps": 5, "optim.base_lr": 0.1},
        **{"fsdp": fsdp, "data.workers": 0},
    )
    done = command("pretrain", begun, f"out={tmp_path / 'second'}", processes=processes)
    assert done.returncode == 0, done.stderr
    before, after = (mpp.load_encoder(tmp_path / name).state_dict() for name in ("first", "second"))
    moved = {name.split(".")[0] + name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"blocks1"}


def test_blocks_of_random_weights_are_not_frozen(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="encoder.free_blocks: random weights would stay as they are"):
        mpp.pretrain(pretrain_recipe(shards, tmp_path / "a", **{"encoder.free_blocks": 1}))
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "b", **{"optim.steps": 1}))
    of_folder = {"encoder": {"name": str(tmp_path / "b"), "free_blocks": 2}}
    with pytest.raises(UserError, match="encoder.free_blocks: the encoder has 2 blocks .*; give fewer"):
        mpp.pretrain(pretrain_recipe(shards, tmp_path / "c", **of_folder))
    assert not (tmp_path / "c").exists()
