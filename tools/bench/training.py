"""One training step, the same for every contestant: forward, backward, clipping, fused AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def update(loss: Tensor, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Do what follows the forward pass."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def adamw(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, fused=True)


class TrainStep:
    """Training steps to be timed. A unit of work is one step.

    Args:
        model: Model that is trained.
        loss: Function that computes the loss. It also makes the mask, if the contestant's model does not.
        batch: Number of images of a step.
        precision: "bf16" or "fp32".
        device: Device that already has the model and what `loss` reads.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[], Tensor], batch: int, precision: str, device: str = "cpu"
    ) -> None:
        self.model, self.loss, self.batch, self.device = model.train(), loss, batch, device
        self.bf16 = precision == "bf16"
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.parameters)
        with FlopCounterMode(display=False) as counter:
            self.run(1)
        self.facts: dict[str, Any] = {"gflop_per_image": counter.get_total_flops() / batch / 1e9}

    def run(self, steps: int) -> int:
        for _ in range(steps):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                loss = self.loss()
            update(loss, self.parameters, self.optimizer)
        torch.get_device_module(self.device).synchronize()
        return steps * self.batch


class Gemm:
    """The machine's own peak: a product of large matrices is one unit of work. `facts` has its GFLOP."""

    def __init__(self, precision: str, device: str = "cpu") -> None:
        dtype, side = torch.bfloat16 if precision == "bf16" else torch.float32, 3072 if device == "cpu" else 8192
        self.a, self.b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        self.device, self.facts = device, {"gflop_per_image": 2 * side**3 / 1e9}

    def run(self, products: int) -> int:
        for _ in range(products):
            torch.nn.functional.linear(self.a, self.b)
        torch.get_device_module(self.device).synchronize()
        return products


def photographs(count: int, side_px: int) -> Tensor:
    """Return (count, 3, side, side) uint8: smooth colours and some noise. The content costs no contestant time."""
    noise = torch.randn(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.avg_pool2d(noise, 3, 1, 1) * 96 + noise * 16 + 128
    return smooth.clamp(0, 255).to(torch.uint8)
