"""Read attention, blocks, filters and position embeddings from a timm model, for `mpp inspect`.

The model is not changed. Attention is recorded by intercepting torch's functions. Only here is
scaled_dot_product_attention computed step by step, since the fused function does not return its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpp.encoders.timm_model import TimmModel
from mpp.inspection.measures import places
from mpp.recipe.flat import JsonObject

SQUARE_WINDOWS = ("SwinTransformer", "SwinTransformerV2")
"""Families whose windows are squares of neighbouring cells. MaxViT's grids have the same shape, but other cells."""
BLOCKS = ("Block", "Bottleneck", "InvertedResidual", "DepthwiseSeparable")
"""Parts of the class names of timm's residual blocks. The outermost modules with such a name are a model's blocks."""


class AttentionRecorder(TorchFunctionMode):
    """Context manager that records every attention computed within it, in order.

    Args:
        keep: Function of the attention weights, (B, heads, queries, keys) float32. It is called at once and its result
            is kept, so that large weights need not be held.
    """

    def __init__(self, keep: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.keep = keep
        self.found: list[object] = []

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: JsonObject | None = None,
    ) -> Tensor:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            output, weights = _written_out(*args, **kwargs)
            self.found.append(self.keep(weights))
            return output
        output = func(*args, **kwargs)
        # for families that never call the fused function
        if func in (torch.softmax, Tensor.softmax, F.softmax) and output.ndim == 4:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim in (-1, 3):
                self.found.append(self.keep(output.float()))
        return output


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute torch's scaled_dot_product_attention without dropout, and return (output, weights in float32)."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)).float() * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = scores.softmax(-1)
    return weights.to(v.dtype) @ v, weights


class TokenPlaces(NamedTuple):
    """Places of the queries and keys of an attention, in pixels, without class and register tokens."""

    queries: Tensor
    """(Nq, 2) centres of the queries, (row, column)"""
    keys: Tensor
    """(Nk, 2) centres of the keys, (row, column)"""
    prefix: int
    """Number of class and register tokens before the patches, for queries and keys"""
    grid: tuple[int, int]
    """Rows and columns of the queries"""
    stride_px: int
    everywhere: bool
    """Whether every place attends to every place of the same grid, as attention rollout requires"""


def layout_of(model: TimmModel, weights: tuple[int, ...], images: int, size: tuple[int, int]) -> TokenPlaces | str:
    """Find the places of the queries and keys of an attention.

    Args:
        model: A timm model.
        weights: Shape of the attention weights.
        images: Number of images in the batch.
        size: (H, W) of the images in pixels.

    Returns:
        The places, or why they are not known.
    """
    if len(weights) != 4:
        return f"attention of {len(weights)} dimensions, over units whose places are not known"
    if hasattr(model, "reroll"):
        return f"{type(model).__name__} keeps its tokens in an order of its own"
    batch, _, queries, keys = weights
    prefix = getattr(model, "num_prefix_tokens", 0)
    info = getattr(model, "feature_info", None) or []
    for stride in sorted({stage["reduction"] for stage in info}):
        gh, gw = size[0] // stride, size[1] // stride
        where = places((gh, gw), stride)
        if batch == images and queries == keys == prefix + gh * gw:
            return TokenPlaces(where, where, prefix, (gh, gw), stride, True)
        if batch == images and queries == gh * gw and keys < queries:
            shrunk = math.isqrt(queries // keys)
            if shrunk * shrunk * keys == queries and gh % shrunk == 0 and gw % shrunk == 0:
                coarse = places((gh // shrunk, gw // shrunk), stride * shrunk)
                return TokenPlaces(where, coarse, 0, (gh, gw), stride, False)
        side = math.isqrt(queries)
        windows = batch // images
        filled = windows == -(-gh // side) * -(-gw // side)  # the last windows are padded
        if type(model).__name__ in SQUARE_WINDOWS and queries == keys == side * side and filled:
            inside = places((side, side), stride)
            return TokenPlaces(inside, inside, 0, (side, side), stride, False)
    return f"{type(model).__name__} attends within parts of the image whose places are not known"


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of a model's residual blocks in order; [] if no class name contains one of `BLOCKS`."""
    named_blocks: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in named_blocks)
        if name and not inside and any(part in type(module).__name__ for part in BLOCKS):
            named_blocks.append((name, module))
    return named_blocks


class Passed(NamedTuple):
    """Input and output of a block."""

    before: Tensor
    after: Tensor


@contextmanager
def watched(modules: Sequence[nn.Module], see: Callable[[int, Passed], None]) -> Iterator[None]:
    """Call `see` with the number, input and output of each module that runs within the context."""

    def hook(number: int) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def after(module: nn.Module, args: tuple[object, ...], out: object) -> None:
            see(number, Passed(_tensor(args), _tensor(out)))

        return after

    handles = [module.register_forward_hook(hook(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensor(value: Any) -> Tensor:
    """Return the first tensor of a module's inputs or outputs."""
    return value if isinstance(value, Tensor) else _tensor(value[0])


def patch_filters(model: TimmModel) -> Tensor | str:
    """Return the (D, C, h, w) weight of the first convolution over the image, or why there is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.weight.detach().float()
        if isinstance(module, nn.Linear):
            break
    return "its image is not embedded by a convolution"


def position_table(model: TimmModel, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]] | str:
    """Return the (N, D) position embeddings of the cells and their grid, or why there are none."""
    table = getattr(model, "pos_embed", None)
    if not isinstance(table, Tensor) or table.ndim != 3:
        name = type(model).__name__
        return f"{name} has no table of positions that is read here (relative ones, rotary ones, several, or none)"
    for stride in sorted({stage["reduction"] for stage in model.feature_info}):
        grid = (size[0] // stride, size[1] // stride)
        extra = table.shape[1] - grid[0] * grid[1]
        if extra in (0, getattr(model, "num_prefix_tokens", 0)):
            return table[0, extra:].detach().float(), grid
    return f"its table of {table.shape[1]} positions is not that of the cells at this size"
