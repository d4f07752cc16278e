"""Parameter groups, the learning-rate schedule, and an optimizer that leaves out steps which are not finite."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from timm.models._manipulate import group_with_matcher
from timm.optim._param_groups import auto_group_layers
from torch import nn

from mpp.parallel.team import Team

ParameterGroup: TypeAlias = dict[str, Any]
"""Parameters of an optimizer with their settings, as torch takes them."""
NO_DECAY_NAMES = ("token", "pos_embed", "bias", "position")
"""Parts of a parameter's own name, not its module's, for which it is not decayed (MAE's and BEiT's published codes)."""

UNMATCHED = "?"
"""A parameter's name that no model has."""


def pretrain_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Two groups: decayed matrices; norms, biases, tokens and positions undecayed. Frozen parameters in neither."""
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
    """Group parameters by layer: the head learns at 1, the last block at layer_decay, the embedding at
    layer_decay^(depth + 1).

    So do BEiT (Bao et al. 2022) and MAE (He et al. 2022, table 9) in their published codes. A norm after pooling
    (`fc_norm`) is no layer of its own: it also learns at 1, without `head_lr_scale`.

    Args:
        encoder: A timm model without classifier.
        head: What is put on it.
        weight_decay: Not applied to vectors and to what the encoder names in `no_weight_decay`.
        layer_decay: Learning rate of a layer over that of the next.
        head_lr_scale: Learning rate of the head over that of the optimizer.

    Returns:
        Groups for the optimizer. `lr_scale` multiplies the learning rate; the encoder's groups have `from_top`, the
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
    number, as if they were one more layer. For a norm after pooling that is right: it belongs to the head. Rotary
    positions (`rope.freqs`) are read by every block, so they count as part of the embedding.

    Returns:
        The layer of each parameter, and depth.
    """
    rope = {name for name, _ in encoder.named_parameters() if name.startswith("rope.")}
    named = [(name, p) for name, p in encoder.named_parameters() if name not in rope]
    matcher: Any = encoder.group_matcher(coarse=False) if hasattr(encoder, "group_matcher") else None  # type: ignore[operator]
    if isinstance(matcher, dict):
        # a name that matches nothing shows which number the parameters have that match nothing
        layers: dict[str, int] = group_with_matcher(iter([*named, (UNMATCHED, None)]), matcher, reverse=True)
        depth = layers.pop(UNMATCHED) - 1
    else:  # a function, or none: every parameter has a layer of the encoder
        layers = group_with_matcher(iter(named), matcher, reverse=True) if matcher else auto_group_layers(encoder)
        depth = max(layers.values())
    return layers | dict.fromkeys(rope, 0), depth


def unfreeze(groups: list[ParameterGroup], *, frozen_steps: int, gradual: bool) -> None:
    """Say at which step each group of the encoder begins to learn; the head's groups do at once.

    Args:
        groups: Those of `finetune_groups`, changed in place.
        frozen_steps: During which none of the encoder, or less and less of it, is frozen.
        gradual: Whether the last block begins after an equal share of `frozen_steps`, and so on down to the first at
            their end; else all begin at their end.
    """
    blocks = 1 + max((group["from_top"] for group in groups if "from_top" in group), default=0)
    for group in groups:
        if "from_top" in group:
            group["starts_at_step"] = frozen_steps * (group["from_top"] + 1) // blocks if gradual else frozen_steps


MOMENTUM = 0.9
"""Of SGD."""


def make_optimizer(
    groups: list[ParameterGroup], *, name: Literal["adamw", "sgd"], betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Return a fused optimizer: AdamW is 5 times faster so than the loop on CPUs at ViT-B's size, no slower on CUDA.

    Args:
        groups: See `pretrain_groups`, `finetune_groups`.
        name: "sgd" has Nesterov's momentum.
        betas: Of AdamW.
    """
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def scheduled_lr(step: int, *, total_steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine (SGDR, Loshchilov & Hutter 2017).

    Args:
        step: From 0; the first step already has lr / warmup_steps.
        total_steps: Of the run.
        warmup_steps: Of the run.
        lr: The highest.
        min_lr: The last.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class GuardedOptimizer:
    """An optimizer of `make_optimizer` whose device leaves out the update of a step that is not finite.

    A step that is left out changes neither weights nor moments nor their count, and the host need not know of it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, team: Team) -> None:
        self.plain = optimizer
        self._wrapped = team.wrap_optimizer(optimizer)

    def update(self, *, lr: float, only_if: torch.Tensor) -> None:
        """Make one optimizer step, then drop the gradients.

        Args:
            lr: Learning rate; each parameter group has its own scale, which torch's schedulers would not apply.
            only_if: () bool on the device.
        """
        for group in self.plain.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if isinstance(self.plain, torch.optim.SGD):
            self._begin_momentum()
        # torch's GradScaler leaves its word here for fused optimizers
        self.plain.found_inf = (~only_if).float()  # type: ignore[attr-defined]
        self._wrapped.step()
        self._wrapped.zero_grad(set_to_none=True)

    def _begin_momentum(self) -> None:
        """Let momentum begin at zero, which is the same as none. torch takes memory as it comes for a first step, and
        would continue from that if the device skipped the first step."""
        for group in self.plain.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in self.plain.state:
                    self.plain.state[p]["momentum_buffer"] = torch.zeros_like(p)
