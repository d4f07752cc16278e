"""The figures of a plan are those of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

import mpp
from mpp.cli.app import main
from mpp.errors import UserError
from mpp.objective.build import build_mask, build_model
from mpp.objective.mask_drawing import draw_masks
from mpp.planning import plan as planning
from mpp.planning.devices import device_here, this_cpu
from mpp.planning.memory import _Live, count_step
from mpp.planning.plan import Plan, _with_loader
from tests.conftest import command, pretrain_recipe, pretrain_values


@pytest.mark.slow
def test_what_the_run_then_says(shards: Path, tmp_path: Path) -> None:
    """The plan gives the run's images, steps, parameters and bytes on the disk."""
    changes = {"optim.steps": None, "optim.epochs": 2, "encoder.args.embed_dim": 96, "keep_checkpoints": 1}
    changes |= {"ema_decay": 0.9}
    recipe = pretrain_recipe(shards, tmp_path / "run", **changes)
    plan = planning.plan(recipe)
    mpp.pretrain(recipe)
    data = json.loads((tmp_path / "run/data.json").read_text())
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (plan.images, plan.held_out, plan.steps) == (data["images"], data["held_out"], status["steps"])
    assert f"{plan.trained / 1e6:.2f} M parameters trained" in (tmp_path / "run/train.log").read_text()
    assert plan.encoder_parameters == mpp.verify(tmp_path / "run/encoder").parameters
    newest = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    written = sum(file.stat().st_size for file in newest.iterdir())
    assert plan.checkpoint_bytes == pytest.approx(written, rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"corruption.name": "drop", "head.name": "transformer"},
        {"corruption.name": "drop", "head.name": "transformer", "masks_per_image": 3},
        {"corruption.enter": 1, "predict_fraction": 0.5},
        {"agreement": {"views": 4}, "corruption.name": "drop", "head.name": "transformer"},
        {"encoder.grad_checkpointing": True},
        {"target": {"name": "ema_teacher", "layers": 2}},
        {"target": {"name": "clusters", "clusters": 64}},
    ],
)
def test_operations_and_memory_are_those_of_a_step(changes: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    """Operations and memory are counted on shapes only, and agree with those of a real step on this CPU."""
    recipe = pretrain_recipe(shards, tmp_path / "run", **{"encoder.args.depth": 4, **changes})
    model, grid = build_model(recipe)
    flop, peak = count_step(recipe, model, grid, 16, "fp32")
    model, grid = build_model(recipe)
    model.train()
    units = draw_masks(build_mask(recipe), grid, 0.5, 0, range(16), recipe.masks_per_image)
    images = torch.zeros(16, 3, 16, 16, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        model(images, units).sum().backward()
    model.zero_grad()
    live = _Live([*model.parameters(), *model.buffers(), images])
    with live:
        model(images, units).sum().backward()
    # the two counts see different operations for attention
    assert flop == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert peak == pytest.approx(live.peak, rel=0.15)


def test_how_it_grows() -> None:
    """Activations grow with the images, but less with activation checkpointing. Devices share the work."""
    values: dict[str, Any] = {"out": "runs/x", "data": {"shards": "none", "image_size": 32}, "optim": {"epochs": 3}}
    values["encoder"] = {"name": "vit_tiny_patch16_224", "args": {"patch_size": 4, "depth": 6}}
    values["optim"] |= {"global_batch_size": 64, "max_batch_per_device": 32}

    def planned(**more: Any) -> Plan:
        keys = {key: more.pop(key) for key in list(more) if key in ("devices", "device", "mfu")}
        return mpp.plan(values, images=10_256, **{"device": "a100", **keys}, **more)

    one = planned()
    assert (one.images, one.held_out, one.micro_batch, one.accumulate) == (10_000, 256, 32, 2)
    assert one.steps in (468, 469)
    activations = "activations, at worst"
    half = planned(**{"optim.max_batch_per_device": 16})
    assert half.memory_bytes[activations] == pytest.approx(one.memory_bytes[activations] / 2, rel=0.2)
    assert half.flop_per_image == pytest.approx(one.flop_per_image)
    less = planned(**{"encoder.grad_checkpointing": True})
    assert less.memory_bytes[activations] < 0.6 * one.memory_bytes[activations]
    assert less.flop_per_image > 1.2 * one.flop_per_image
    rounded = planned(precision="fp32")
    assert rounded.seconds == pytest.approx(one.seconds * 312 / 19.5, rel=0.01)
    assert planned(device="h100", mfu=0.6).seconds == pytest.approx(one.seconds * 312 / 989 / 2, rel=0.01)
    two, sharded = planned(devices=2), planned(devices=2, fsdp=True)
    assert two.seconds == pytest.approx(one.seconds / 2)
    assert two.memory_bytes["gradient buffers (DDP)"] == two.memory_bytes["gradients"]
    assert sharded.memory_bytes["AdamW's moments"] == two.memory_bytes["AdamW's moments"] // 2
    assert sharded.host_bytes > 0


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    words = ["recipes/pretrain/vit_small.yaml", "--images", "50000", "--devices", "2", "--device", "rtx4090"]
    done = command("plan", *words, cwd=Path(mpp.__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    for part in (
        "M parameters",
        "GFLOP an image",
        "images an epoch",
        "memory of each rtx4090",
        "activations",
        "disk: ",
    ):
        assert part in done.stdout
    values = {"out": "runs/x", "data": {"shards": "none", "image_size": 224}, "optim": {"epochs": 1}}
    (tmp_path / "r.yaml").write_text(json.dumps(values | {"encoder": {"name": "vit_tiny_patch16_224"}}))
    found = CliRunner().invoke(
        main, ["plan", str(tmp_path / "r.yaml"), "--images", "9999", "--device", "a10", "--json"]
    )
    assert json.loads(found.stdout)["images"] == 9999 - 256


@pytest.mark.parametrize(
    ("gpu", "device"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA A10", "a10"),
        ("Tesla V100", "no figures for Tesla V100"),
        (None, "cpu"),
    ],
)
def test_the_device_of_this_machine(gpu: str | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: gpu)
    if device.startswith("no"):
        with pytest.raises(UserError, match=device):
            device_here()
    else:
        assert device_here() == device


def test_what_is_refused(shards: Path, tmp_path: Path) -> None:
    recipe = pretrain_recipe(shards, tmp_path / "run")
    for options, message in (
        ({"device": "tpu"}, "--device: expected one of a100, h100"),
        (
            {"device": "cpu", "devices": 2},
            "--devices: 2: steps of a CPU are timed in one process; give --device, one of a100",
        ),
        ({"mfu": 1.5}, "--mfu: must be > 0 and <= 1; got 1.5"),
        ({"device": "a100", "devices": 3}, "optim.global_batch_size: 16 cannot be divided among 3 processes"),
        ({"images": 10}, "data.held_out is 12, but there are only 10 images"),
    ):
        with pytest.raises(UserError, match=message):
            planning.plan(recipe, **options)


def test_this_machine(shards: Path) -> None:
    """On this CPU, steps and reading are timed, and `precision: auto` means fp32."""
    values = pretrain_values(shards, "out")
    found = mpp.plan(values, device="cpu")
    assert 0 < found.mfu < 1.5
    assert found.read_images_per_s is not None
    assert found.read_images_per_s > 10
    assert found.peak_tflops == this_cpu().tflops["fp32"]
    assert 1e-3 < found.peak_tflops < 100
    assert 1 < this_cpu().memory_gb < 100_000
    assert "images/s, with the loader, which by itself reads" in found.text()
    assert "reading them is not counted" in mpp.plan(values, device="cpu", images=60).text()
    asked = [mpp.plan(values, device="cpu", mfu=mfu, images=60).seconds for mfu in (0.6, 0.3)]
    assert asked[1] == pytest.approx(2 * asked[0])
    assert mpp.plan(values, images=60, device="a100").mfu == 0.3
    views = mpp.plan(pretrain_values(shards, "out", agreement={"views": 4}), device="cpu")
    assert views.epochs == found.epochs / 4


@pytest.mark.parametrize(
    ("threads", "workers", "step_s"),
    [
        (2, 0, 10 + 4),  # one after the other
        (2, 1, (2 * 10 + 4) / 2),  # both cores are always busy
        (1, 1, 10),  # the other core reads
        (1, 4, 10),
    ],
)
def test_threads_and_workers_share_the_cores(
    threads: int, workers: int, step_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are two cores, steps compute for 10 s, and reading their images takes 4 s."""
    monkeypatch.setattr("mpp.planning.plan.cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert _with_loader(10, 4, workers) == step_s
    assert _with_loader(1, 40, 2) == pytest.approx(max(20, (threads + 40) / 2)), "the dataloader must be the bottleneck"


def test_attention_is_counted_as_fused() -> None:
    """The memory for long sequences grows with their tokens, not with tokens × tokens, which are not kept."""
    args = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 8}
    sizes = {}
    for side_px in (64, 128):  # 256 and 1,024 patches
        values = pretrain_values(
            "nowhere", "out", **{"encoder.args": args, "data.image_size": side_px, "corruption": "token"}
        )
        sizes[side_px] = mpp.plan(values, images=1000, device="a100").memory_bytes["activations, at worst"]
    assert sizes[128] < 6 * sizes[64]
