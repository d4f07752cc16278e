"""Parameter groups, optimizers and the learning rate schedule."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpp.finetuning.tasks.classify import ClassifyTask
from mpp.objective.build import build_model
from mpp.parallel.team import start_team
from mpp.training.optimizer import (
    GuardedOptimizer,
    finetune_groups,
    make_optimizer,
    matrices_in_blocks,
    pretrain_groups,
    scheduled_lr,
)
from mpp.training.plan import Plan, steps_of
from tests.conftest import pretrain_recipe


def test_norms_biases_tokens_and_positions_are_not_decayed() -> None:
    model, _ = build_model(pretrain_recipe("none", "none", **{"corruption.name": "drop", "head.name": "transformer"}))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in pretrain_groups(model, 0.05))
    assert decayed | plain == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not decayed & plain
    assert {"encoder.model.cls_token", "encoder.model.pos_embed", "objectives.0.head.mask_token"} <= plain
    assert all(n.endswith("weight") and "norm" not in n for n in decayed)
    assert "encoder.model.blocks.0.attn.qkv.weight" in decayed
    assert "encoder.model.norm.weight" not in decayed | plain, "pretraining does not use the final norm"


def test_matrices_of_modules_named_after_tokens_are_decayed() -> None:
    mixer = timm.create_model("resmlp_12_224", num_classes=0)
    (decayed, _) = pretrain_groups(mixer, 0.05)
    names = {id(p): n for n, p in mixer.named_parameters()}
    assert "blocks.0.linear_tokens.weight" in {names[id(p)] for p in decayed["params"]}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layer_decay_reaches_the_optimizer(name: Any) -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=4, embed_dim=32, num_heads=2)
    task = ClassifyTask(32, 5)
    groups = finetune_groups(encoder, task, weight_decay=0.1, layer_decay=0.5, head_lr_scale=3.0)
    optimizer = make_optimizer(groups, name=name, betas=(0.9, 0.999), encoder=encoder)
    GuardedOptimizer(optimizer, start_team("fp32")).update(lr=1.0, only_if=torch.tensor(True))
    names = {id(p): n for n, p in [*encoder.named_parameters(), *task.named_parameters()]}
    lr = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(lr) == len(names)
    assert lr["out.weight"] == 3.0
    blocks = [lr[f"blocks.{i}.attn.qkv.weight"] for i in range(4)]
    assert blocks == [
        0.5**4,
        0.5**3,
        0.5**2,
        0.5,
    ]  # as in BEiT and MAE: the head at 1, the last block below
    assert lr["patch_embed.proj.weight"] == lr["pos_embed"] == 0.5**5
    with_head = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=4, embed_dim=32, num_heads=2)
    for group in timm.optim.param_groups_layer_decay(with_head, layer_decay=0.5):  # must agree with timm
        for name in [n for n, p in with_head.named_parameters() if any(p is q for q in group["params"])]:
            assert lr.get(name, 1.0) == group["lr_scale"]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@given(total=st.integers(1, 500), warmup=st.integers(0, 50), lr=st.floats(1e-6, 1.0))
def test_the_schedule_warms_up_then_only_falls(schedule: Any, total: int, warmup: int, lr: float) -> None:
    values = [
        scheduled_lr(s, schedule=schedule, total_steps=total, warmup_steps=warmup, lr=lr, min_lr=lr / 100)
        for s in range(total)
    ]
    assert all(0 < v <= lr * (1 + 1e-9) for v in values)
    after = values[warmup:]
    assert all(a >= b for a, b in zip(after, after[1:], strict=False))
    if after:
        assert after[0] == pytest.approx(lr), "it does not fall before the warm-up has ended"
    if 0 < warmup < total:
        assert values[warmup - 1] == pytest.approx(lr)
        assert values[0] == pytest.approx(lr / warmup)


def test_wsd_is_constant_for_four_fifths() -> None:
    plan = plan_of(schedule="wsd", total_steps=100, global_batch_size=256, every_steps={})
    assert plan.steps_before_decay == 80
    assert {plan.lr(step) for step in range(2, 81)} == {1.0}
    assert plan.lr(85) == pytest.approx(1 - 0.25**0.5)
    assert plan.due_after(79) == frozenset(), "a trial of a fine-tuning cannot be made longer"
    kept = plan_of(schedule="wsd", total_steps=100, every_steps={}, save_before_decay=True)
    assert kept.due_after(79) == {"checkpoint"}, "a longer run begins from here"
    longer = plan_of(schedule="wsd", total_steps=200, global_batch_size=256)
    assert [plan.lr(step) for step in range(80)] == [longer.lr(step) for step in range(80)]
    assert {plan_of(schedule="constant", global_batch_size=256).lr(step) for step in range(2, 10)} == {1.0}


def test_steps_of() -> None:
    assert steps_of(None, 7, 100, 10) == 7
    assert steps_of(2.5, None, 100, 10) == 25
    assert steps_of(0.001, None, 100, 10) == 1


TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
PLAIN = {
    "adamw": partial(torch.optim.AdamW, lr=0.0, betas=(0.9, 0.95), foreach=False),
    "sgd": partial(torch.optim.SGD, lr=0.0, momentum=0.9, nesterov=True, foreach=False),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_fused_optimizer_is_the_plain_one(name: Any) -> None:
    states = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 5)
        groups = [{"params": list(model.parameters()), "weight_decay": 0.1, "lr_scale": 1.0}]
        made = partial(make_optimizer, name=name, betas=(0.9, 0.95), encoder=model) if fused else PLAIN[name]
        optimizer = made(groups)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        for i in range(5):
            model(torch.full((2, 5), float(i))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(model.weight.detach())
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("name", [*PLAIN, "muon"])
@pytest.mark.parametrize("left_out", [0, 1])
def test_an_update_that_is_left_out(left_out: int, name: Any) -> None:
    """Weights, moments and step counts stay unchanged, even if the first step is left out."""
    weights = {}
    for steps in ((0, 1, 2), tuple(step for step in (0, 1, 2) if step != left_out)):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", **TINY, num_classes=0)
        weight = model.blocks[0].mlp.fc1.weight
        groups = [{"params": list(model.parameters()), "weight_decay": 0.1, "lr_scale": 1.0}]
        optimizer = make_optimizer(groups, name=name, betas=(0.9, 0.95), encoder=model)
        guarded = GuardedOptimizer(optimizer, start_team("fp32"))
        for step in steps:
            before = weight.detach().clone()
            model(torch.full((2, 3, 16, 16), 1.0 + step)).square().sum().backward()
            guarded.update(lr=0.1, only_if=torch.tensor(step != left_out))
            assert all(p.grad is None for p in model.parameters())
            assert torch.equal(before, weight) == (step == left_out)
        weights[len(steps)] = (weight.detach(), dict(optimizer.state[weight]))
    (with_it, state), (without, state_without) = weights[3], weights[2]
    assert {"adamw": "exp_avg", "sgd": "momentum_buffer", "muon": "momentum_buffer"}[name] in state
    assert torch.equal(with_it, without)
    assert state.keys() == state_without.keys()
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(state_without[key])) for key, v in state.items())


def test_muon_trains_the_matrices_of_blocks() -> None:
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2, "reg_tokens": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, **small)
    resnet = timm.create_model("resnet10t", num_classes=3)
    convnext = timm.create_model("convnext_atto", num_classes=0, dims=[8] * 4, depths=[1] * 4)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, embed_dim=16, depths=[1, 1], num_heads=[2, 2]
    )
    for model, inside, outside in (
        (
            vit,
            "blocks.0.attn.qkv.weight blocks.1.mlp.fc2.weight",
            "patch_embed.proj.weight pos_embed reg_token head.weight",
        ),
        (convnext, "stages.0.blocks.0.mlp.fc1.weight", "stages.0.blocks.0.conv_dw.weight stem.0.weight"),
        (resnet, "layer1.0.conv1.weight layer4.0.conv2.weight", "conv1.0.weight fc.weight layer1.0.bn1.weight"),
        (
            swin,
            "layers.0.blocks.0.mlp.fc1.weight layers.1.blocks.0.attn.qkv.weight",
            "patch_embed.proj.weight layers.0.blocks.0.attn.relative_position_bias_table",
        ),
    ):
        chosen = matrices_in_blocks(model)
        names = {name for name, p in model.named_parameters() if p in chosen}
        assert set(inside.split()) <= names
        assert not set(outside.split()) & names
        assert set(outside.split()) <= {name for name, _ in model.named_parameters()}


def test_an_update_of_muon_has_singular_values_of_about_one_size() -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, embed_dim=32, num_heads=2, img_size=32)
    weight = vit.blocks[1].mlp.fc1.weight
    groups = [{"params": list(vit.parameters()), "weight_decay": 0.0, "lr_scale": 1.0}]
    optimizer = make_optimizer(groups, name="muon", betas=(0.9, 0.95), encoder=vit)
    before = weight.detach().clone()
    vit(torch.randn(8, 3, 32, 32)).square().sum().backward()
    of_gradient = torch.linalg.svdvals(weight.grad)
    GuardedOptimizer(optimizer, start_team("fp32")).update(lr=0.1, only_if=torch.tensor(True))
    of_update = torch.linalg.svdvals(weight.detach() - before)
    assert of_gradient[0] > 3 * of_gradient[7]
    assert of_update[0] < 1.5 * of_update[7], "the gradient of 8 images has 8 large ones"


def plan_of(**changes: object) -> Plan:
    values: dict[str, object] = {
        "total_steps": 10, "warmup_steps": 2, "global_batch_size": 512, "micro_batches": 1, "base_lr": 1.0,
        "min_lr": 0.0, "every_steps": {"log": 3, "checkpoint": 4},
    }  # fmt: skip
    return Plan(**(values | changes))  # type: ignore[arg-type]


def test_what_is_due_after_a_step() -> None:
    plan = plan_of(log_first_step=True)
    due = [sorted(plan.due_after(step)) for step in range(10)]
    assert due == [
        ["log"], [], ["log"], ["checkpoint"], [], ["log"], [], ["checkpoint"], ["log"], ["checkpoint", "end", "log"],
    ]  # fmt: skip
    assert plan_of().due_after(0) == frozenset()


def test_the_learning_rate_grows_with_the_global_batch() -> None:
    assert plan_of().lr(1) == 2 * plan_of(global_batch_size=256).lr(1) == 2.0
    assert plan_of(warmup_steps=11).never_reaches_full_lr
    assert not plan_of(warmup_steps=10).never_reaches_full_lr
