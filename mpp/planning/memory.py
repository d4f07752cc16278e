"""Count the floating-point operations and the memory of one training step on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from mpp.objective.build import build_mask
from mpp.objective.mask_drawing import draw_masks
from mpp.objective.model import MaskedPatchModel
from mpp.recipe.flat import JsonObject
from mpp.recipe.pretrain import PretrainRecipe

CUDA_KEEPS = "what CUDA and its libraries keep for themselves, about 1 GB, and "


class _Live(TorchDispatchMode):
    """A mode that counts the bytes of live tensors, now and at the peak. Tensors in `before` are not counted."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in before}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: JsonObject | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            size = storage.nbytes()
            self._known.add(storage._cdata)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, storage._cdata, size)
        return tensor

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Attention(torch.autograd.Function):
    """Stand-in for fused attention that keeps the same tensors for its backward pass.

    On the meta device, torch would compute attention step by step, which keeps more.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


@contextmanager
def _fused() -> Iterator[None]:
    """Replace attention without a bias by `_Attention`, because every device used for training fuses it."""
    original = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **more: Any) -> Tensor:
        return original(q, k, v, attn_mask, *args, **more) if attn_mask is not None else _Attention.apply(q, k, v)

    # The function is replaced because a mode of torch would not see what activation checkpointing computes again.
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def count_step(
    recipe: PretrainRecipe, model: MaskedPatchModel, grid: tuple[int, int], micro: int, precision: str
) -> tuple[float, int]:
    """Count the operations and the memory of one forward and backward pass.

    Args:
        recipe: Recipe of pretraining.
        model: Model of the recipe. It is moved to the meta device.
        grid: (rows, columns) of mask units.
        micro: Number of images in the pass.
        precision: "fp32" or "bf16".

    Returns:
        (floating-point operations, peak bytes of activations and gradients).
    """
    units = draw_masks(build_mask(recipe), grid, 0.5, 0, range(micro), recipe.masks_per_image)
    meta = torch.device("meta")
    model.to(meta).train()
    dtype = torch.uint8 if recipe.data.eight_bit else torch.float32
    images = torch.zeros(micro, recipe.data.channels, *recipe.data.image_size, dtype=dtype, device=meta)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            losses = model(images, units.tensors_by(lambda t: t.to(meta)))
        losses.sum().backward()
        for p in model.parameters():
            p.grad = None

    with FlopCounterMode(display=False) as flop:  # in a pass of its own, because the counter keeps tensors alive
        step()
    live = _Live([*model.parameters(), *model.buffers(), images])
    with _fused(), live:
        step()
    return float(flop.get_total_flops()), live.peak


def bytes_of(size: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"
