"""Muon for the matrices of the encoder's blocks, AdamW for the other weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.optim.muon import zeropower_via_newtonschulz

MOMENTUM = 0.95
"""Decay rate of Muon's momentum (Jordan et al. 2024)."""

ITERATIONS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
"""Coefficients (a, b, c) of X ← aX + b(XXᵀ)X + c(XXᵀ)²X, one triple for each iteration (You et al. 2024, in the
published code of modded-nanogpt; timm's default)."""

SMALLEST_NORM = 1e-7
"""Gradients of a smaller norm are not scaled up to norm 1."""


class Muon(torch.optim.AdamW):
    """Fused AdamW that trains the parameter groups with `use_muon` by orthogonalised momentum.

    Updates are scaled to the size of AdamW's, so that both take the same rates (Liu et al. 2025, "Muon is Scalable for
    LLM Training", section 2.2). Like torch's fused optimizers it makes no update if its attribute `found_inf` is 1.

    Args:
        groups: Parameter groups. Each has the key `use_muon`.
        betas: Decay rates of AdamW's two moments.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=0.0, betas=betas, fused=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for of_weight in state.get("state", {}).values():  # earlier versions did not count the steps of Muon
            of_weight.setdefault("step", torch.zeros(()))
        super().__setstate__(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update of all weights that have a gradient, and drop the gradients of those that Muon trains."""
        for group in self.param_groups:
            for weight in group["params"] if group["use_muon"] else ():
                if weight.grad is not None:
                    self._update(weight, weight.grad, lr=group["lr"], weight_decay=group["weight_decay"])
                    weight.grad = None  # AdamW below leaves out weights without a gradient
        return super().step(closure)

    def _update(self, weight: torch.Tensor, gradient: torch.Tensor, *, lr: float, weight_decay: float) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)  # AdamW asks for it when a state is loaded
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"]
        # 0 for a step that is left out: nothing changes then, and the host need not wait for the device to know it.
        share = 1 - getattr(self, "found_inf", torch.zeros((), device=weight.device))
        state["step"] += share
        momentum.lerp_(gradient.where(share > 0, 0), (1 - MOMENTUM) * share)
        direction = orthogonalize(momentum.flatten(1)).reshape(weight.shape)
        longer_side = max(len(weight), weight[0].numel())
        weight.mul_(1 - lr * weight_decay * share).sub_(0.2 * longer_side**0.5 * lr * share * direction)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with singular values of about 1 in place of its own, by five Newton-Schulz iterations.

    On CPUs the iterations run in fp32, and on the product of the matrix with its transpose, which is smaller than a
    wide or tall matrix: half the time of fp32 on the whole matrix, and a thirtieth of bf16 on CPUs without instructions
    for it (recipes/LOG.md).

    Args:
        matrix: (rows, columns).

    Returns:
        (rows, columns).
    """
    if matrix.device.type != "cpu":
        return zeropower_via_newtonschulz(matrix, len(ITERATIONS), ITERATIONS, eps=SMALLEST_NORM).to(matrix.dtype)
    wide = matrix.float() if len(matrix) <= matrix.size(1) else matrix.float().mT
    wide = wide / wide.norm().clamp(min=SMALLEST_NORM)
    gram = wide @ wide.mT
    product: torch.Tensor | None = None
    for a, b, c in ITERATIONS:
        # X ← factor · X, so XXᵀ ← factor · XXᵀ · factor. X itself is needed only at the end.
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        gram = factor @ gram @ factor
    wide = product @ wide
    return (wide if len(matrix) <= matrix.size(1) else wide.mT).to(matrix.dtype)
