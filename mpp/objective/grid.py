"""Masks on grids of units and cells: count, choose, blank and copy; positions of cells."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpp.encoders.cells import patchify, repeat_cells, unpatchify


def blank_hidden(images: Tensor, hidden: Tensor) -> Tensor:
    """Zero the pixels of hidden cells: (B, C, H, W) and (B, gh, gw) bool.

    Done before anything else reads the image, so no convolution, norm or pooling of any encoder can carry a
    hidden pixel into a prediction. A fill, not a product: NaN · 0 is NaN.
    """
    pixels = repeat_cells(hidden, images.shape[-1] // hidden.shape[-1]).unsqueeze(1)
    return images.masked_fill(pixels, 0.0)


def hidden_cells(hidden: Tensor, count: int) -> Tensor:
    """(B, gh, gw) bool with `count` cells hidden in each image -> (B, count) int64, ascending."""
    return hidden.flatten(1).int().argsort(dim=1, descending=True, stable=True)[:, :count]


def visible_cells(hidden: Tensor, hidden_count: int) -> Tensor:
    """(B, gh, gw) bool with `hidden_count` cells hidden in each image -> (B, N - hidden_count), ascending."""
    flat = hidden.flatten(1).int()
    return flat.argsort(dim=1, stable=True)[:, : flat.shape[1] - hidden_count]


def count_hidden(units: int, ratio: float | tuple[float, float], draw: float) -> int:
    """Return how many of so many units to hide; at least one is hidden and one visible.

    Args:
        units: How many there are.
        ratio: The part to hide, or the least and the greatest.
        draw: In [0, 1): where in a range.
    """
    low, high = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    return min(max(round(units * (low + (high - low) * draw)), 1), units - 1)


def lowest(values: Tensor, count: int) -> Tensor:
    """(B, ...) -> the same shape, bool: True at the `count` lowest values of each image; ties by place."""
    flat = values.flatten(1)
    chosen = flat.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, True).view(values.shape)


def copy_visible(images: Tensor, where: Tensor, hidden: Tensor, hidden_count: int, noise: Tensor) -> Tensor:
    """Put random visible units of the same image in the place of others.

    Args:
        images: (B, C, H, W).
        where: (B, uh, uw) bool: the units that are replaced.
        hidden: (B, uh, uw) bool.
        hidden_count: How many are hidden in each image.
        noise: (B, uh, uw) in [0, 1), which chooses the source of each unit.
    """
    size_px = images.shape[-1] // hidden.shape[-1]
    units = patchify(images, size_px)
    visible = visible_cells(hidden, hidden_count)
    pick = (noise.flatten(1) * visible.shape[1]).long().clamp_max(visible.shape[1] - 1)
    source = visible.gather(1, pick).unsqueeze(-1).expand_as(units)
    mixed = torch.where(where.flatten(1).unsqueeze(-1), units.gather(1, source), units)
    return unpatchify(mixed, size_px, (hidden.shape[1], hidden.shape[2]))


def sincos_positions(grid: tuple[int, int], dim: int, device: torch.device | None = None) -> Tensor:
    """Make fixed 2-D sine-cosine positions.

    The first half of the channels encodes the column, the second half the row, each as sines and then cosines,
    temperature 10,000: MAE (He et al. 2022), appendix A.1 and its published code, after the 1-D form of Vaswani et al.
    2017, section 3.5.

    Args:
        grid: (rows, columns).
        dim: A multiple of 4.
        device: Where they are.

    Returns:
        (N, dim) float32.

    Raises:
        ValueError: `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4; got {dim}")
    gh, gw = grid
    rates = 10000.0 ** -(torch.arange(dim // 4, device=device, dtype=torch.float64) / (dim // 4))
    rows = torch.arange(gh, device=device, dtype=torch.float64).repeat_interleave(gw)
    cols = torch.arange(gw, device=device, dtype=torch.float64).repeat(gh)
    angles = [axis[:, None] * rates for axis in (cols, rows)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


def decoder_dim(encoder_dim: int, dim: int | None, num_heads: int) -> int:
    """Choose the width of a light decoder.

    Args:
        encoder_dim: Width of the encoder.
        dim: What was asked for; None: half the encoder's, rounded down to what positions and heads allow (a guess,
            after MAE's 512 beside an encoder of 1024).
        num_heads: Of its attention.

    Raises:
        ValueError: `dim` is no multiple of 4 (sine-cosine positions) and of `num_heads`.
    """
    step = math.lcm(4, num_heads)
    if dim is None:
        return max(encoder_dim // 2 // step, 1) * step
    if dim % step:
        raise ValueError(f"dim must be a multiple of 4 and of num_heads ({num_heads}); got {dim}")
    return dim
