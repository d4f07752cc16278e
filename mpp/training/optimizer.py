"""Parameter groups, the learning-rate schedule, and an optimizer that skips steps that are not finite."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from timm.models._manipulate import group_with_matcher
from timm.optim._param_groups import auto_group_layers
from torch import nn

from mpp.parallel.team import Team
from mpp.training.muon import Muon

ParameterGroup: TypeAlias = dict[str, Any]
"""Parameters of an optimizer with their settings, as torch takes them."""
NO_DECAY_NAMES = ("token", "pos_embed", "bias", "position")
"""Parameters whose own name contains one of these are not decayed (MAE's and BEiT's published code). The name of the
module does not count."""

UNMATCHED = "?"
"""Name of a parameter that no model has."""


def pretrain_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Return two groups: matrices with weight decay; norms, biases, tokens and positions without.

    Frozen parameters are in neither group.
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [(n, p) for n, p in trained if p.ndim <= 1 or any(part in n.split(".")[-1] for part in NO_DECAY_NAMES)]
    names = {n for n, _ in plain}
    return [
        {"params": [p for n, p in trained if n not in names], "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": [p for _, p in plain], "weight_decay": 0.0, "lr_scale": 1.0},
    ]


def finetune_groups(
    encoder: nn.Module, head: nn.Module, *, weight_decay: float, layer_decay: float, head_lr_scale: float
) -> list[ParameterGroup]:
    """Group parameters by layer, each with its own learning rate.

    The rates are relative to that of the optimizer: `head_lr_scale` for the head, layer_decay for the last block, and
    layer_decay^(depth + 1) for the embedding. BEiT (Bao et al. 2022) and MAE (He et al. 2022, table 9) do the same in
    their published code. A norm after pooling (`fc_norm`) is not a layer of its own: its rate is 1.

    Args:
        encoder: A timm model without classifier.
        head: Head on top of the encoder.
        weight_decay: Weight decay. It is not applied to vectors and to parameters in the encoder's `no_weight_decay`.
        layer_decay: Learning rate of a layer divided by that of the next layer.
        head_lr_scale: Learning rate of the head divided by that of the optimizer.

    Returns:
        Groups for the optimizer. `lr_scale` multiplies the learning rate. Groups of the encoder have `from_top`, the
        number of blocks above their own.
    """
    undecayed = set(encoder.no_weight_decay()) if hasattr(encoder, "no_weight_decay") else set()  # type: ignore[operator]
    layers, depth = layer_numbers(encoder)
    groups: dict[tuple[int, bool], ParameterGroup] = {}
    for name, p in encoder.named_parameters():
        if not p.requires_grad:
            continue
        decayed = p.ndim > 1 and name not in undecayed
        group = groups.setdefault(
            (layers[name], decayed),
            {
                "params": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": layer_decay ** (depth + 1 - layers[name]),
                "from_top": max(depth - layers[name], 0),
            },
        )
        group["params"].append(p)
    of_head = [{**group, "lr_scale": head_lr_scale} for group in pretrain_groups(head, weight_decay)]
    return [g for g in [*groups.values(), *of_head] if g["params"]]


def layer_numbers(encoder: nn.Module) -> tuple[dict[str, int], int]:
    """Number the layers of a timm model: 0 is the embedding, `depth` the last block, depth + 1 what follows it.

    timm's `group_matcher` names the embedding and the blocks. Parameters that it does not name get the largest
    number, as if they were one more layer. This is right for a norm after pooling, which belongs to the head. Rotary
    positions (`rope.freqs`) are read by every block, so they count as part of the embedding.

    Returns:
        (the layer of each parameter by name, depth).
    """
    rope = {name for name, _ in encoder.named_parameters() if name.startswith("rope.")}
    named = [(name, p) for name, p in encoder.named_parameters() if name not in rope]
    matcher: Any = encoder.group_matcher(coarse=False) if hasattr(encoder, "group_matcher") else None  # type: ignore[operator]
    if isinstance(matcher, dict):
        # Parameters that match nothing get the same number as this name, which matches nothing.
        layers: dict[str, int] = group_with_matcher(iter([*named, (UNMATCHED, None)]), matcher, reverse=True)
        depth = layers.pop(UNMATCHED) - 1
    else:  # the matcher is a function or missing, so every parameter belongs to a layer of the encoder
        layers = group_with_matcher(iter(named), matcher, reverse=True) if matcher else auto_group_layers(encoder)
        depth = max(layers.values())
    return layers | dict.fromkeys(rope, 0), depth


def unfreeze(groups: list[ParameterGroup], *, frozen_steps: int, gradual: bool) -> None:
    """Set the step at which each group of the encoder starts to learn. The head's groups learn from the first step.

    Args:
        groups: Groups of `finetune_groups`, changed in place.
        frozen_steps: Number of steps after which the whole encoder learns.
        gradual: Whether blocks start one after the other at equal intervals, the last block first, so that the lowest
            group starts after `frozen_steps`. Otherwise all groups start after `frozen_steps`.
    """
    blocks = 1 + max((group["from_top"] for group in groups if "from_top" in group), default=0)
    for group in groups:
        if "from_top" in group:
            group["starts_at_step"] = frozen_steps * (group["from_top"] + 1) // blocks if gradual else frozen_steps


MOMENTUM = 0.9
"""Momentum of SGD."""


OptimizerName: TypeAlias = Literal["adamw", "sgd", "muon"]


def make_optimizer(
    groups: list[ParameterGroup], *, name: OptimizerName, betas: tuple[float, float], encoder: nn.Module
) -> torch.optim.Optimizer:
    """Return an optimizer. AdamW and SGD are fused.

    At the size of ViT-B, fused AdamW is 5 times faster than torch's loop on CPUs, and not slower on CUDA.

    Args:
        groups: Groups of `pretrain_groups` or `finetune_groups`.
        name: Name of the optimizer. "sgd" has Nesterov momentum. "muon" trains the matrices of the encoder's
            blocks, and AdamW the other weights at the same rate.
        betas: Decay rates of AdamW's two moments.
        encoder: The timm model.
    """
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True, fused=True)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    in_blocks = matrices_in_blocks(encoder)
    divided = []
    for group in groups:
        for use_muon in (True, False):
            chosen = [p for p in group["params"] if (p in in_blocks) == use_muon]
            divided += [{**group, "params": chosen, "use_muon": use_muon}] if chosen else []
    return Muon(divided, betas)


def matrices_in_blocks(encoder: nn.Module) -> set[nn.Parameter]:
    """Return the matrices and kernels of a timm model between its embedding and its last norm or layer.

    Muon is meant for these (Jordan et al. 2024). Tokens, positions and depthwise kernels are not among them.
    """
    layers, depth = layer_numbers(encoder)
    return {
        p
        for name, p in encoder.named_parameters()
        if p.ndim > 1
        and min(p.shape[:2]) > 1
        and 0 < layers[name] <= depth
        and not any(part in name.split(".")[-1] for part in NO_DECAY_NAMES)
    }


Schedule: TypeAlias = Literal["cosine", "wsd", "constant"]
WSD_DECAY = 0.2
"""Part of a run in which the rate of `wsd` falls (Hägele et al. 2024)."""


def last_full_rate_step(schedule: Schedule, *, total_steps: int, warmup_steps: int) -> int:
    """Return the last step, from 0, with the full learning rate. It is `total_steps` if the rate never falls."""
    if schedule == "cosine":
        return warmup_steps
    return max(total_steps - round(WSD_DECAY * total_steps), warmup_steps) if schedule == "wsd" else total_steps


def scheduled_lr(
    step: int, *, schedule: Schedule = "cosine", total_steps: int, warmup_steps: int, lr: float, min_lr: float
) -> float:
    """Return the learning rate of a step: linear warm-up, then the schedule.

    Args:
        step: Number of the step, from 0. The first step already has lr / warmup_steps.
        schedule: "cosine": half a cosine (SGDR, Loshchilov & Hutter 2017). "wsd": constant, and in the last fifth
            1 - sqrt (Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations").
            "constant": constant.
        total_steps: Number of steps of the run.
        warmup_steps: Number of steps of the warm-up.
        lr: Highest learning rate.
        min_lr: Learning rate at the end.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    first = last_full_rate_step(schedule, total_steps=total_steps, warmup_steps=warmup_steps)
    progress = min(max(step - first, 0) / max(total_steps - first, 1), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - math.sqrt(progress)
    return min_lr + (lr - min_lr) * left


class GuardedOptimizer:
    """An optimizer of `make_optimizer` that skips the update of a step that is not finite.

    A skipped step does not change weights, moments or their step count. The device skips it without the host.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, team: Team) -> None:
        self.plain = optimizer
        self._wrapped = team.wrap_optimizer(optimizer)

    def update(self, *, lr: float, only_if: torch.Tensor) -> None:
        """Make one optimizer step, then drop the gradients.

        Args:
            lr: Learning rate. It is multiplied by the scale of each parameter group, which torch's schedulers would not
                do.
            only_if: () bool on the device: whether to make the update.
        """
        for group in self.plain.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if isinstance(self.plain, torch.optim.SGD):
            self._begin_momentum()
        # All three optimizers skip the update if this attribute is 1. torch's GradScaler uses it in the same way.
        self.plain.found_inf = (~only_if).float()  # type: ignore[attr-defined]
        self._wrapped.step()
        self._wrapped.zero_grad(set_to_none=True)

    def _begin_momentum(self) -> None:
        """Start momentum at zero, which gives the same first step as no momentum.

        Otherwise torch allocates the buffer uninitialised in the first step, and would continue from that if the device
        skipped the step.
        """
        for group in self.plain.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in self.plain.state:
                    self.plain.state[p]["momentum_buffer"] = torch.zeros_like(p)
