"""Operations on masks of units or cells (count, choose, blank, copy), and position embeddings of cells."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpp.encoders.cells import patchify, repeat_cells, unpatchify


def blank_hidden(images: Tensor, hidden: Tensor) -> Tensor:
    """Set the pixels of hidden cells to zero: images (B, C, H, W) and hidden (B, gh, gw) bool.

    This is done before anything else reads the image. No convolution, norm or pooling of any encoder can then carry a
    hidden pixel into a prediction. The pixels are filled and not multiplied, because NaN · 0 is NaN.
    """
    pixels = repeat_cells(hidden, images.shape[-1] // hidden.shape[-1]).unsqueeze(1)
    return images.masked_fill(pixels, 0.0)


def hidden_cells(hidden: Tensor, count: int) -> Tensor:
    """Return the numbers of hidden cells, ascending: (B, gh, gw) bool with `count` hidden per image -> (B, count)."""
    return hidden.flatten(1).int().argsort(dim=1, descending=True, stable=True)[:, :count]


def visible_cells(hidden: Tensor, hidden_count: int) -> Tensor:
    """Return the numbers of visible cells, ascending: (B, gh, gw) bool -> (B, N - hidden_count) int64.

    `hidden_count` is the number of hidden cells in each image.
    """
    flat = hidden.flatten(1).int()
    return flat.argsort(dim=1, stable=True)[:, : flat.shape[1] - hidden_count]


def group_cells(grid_map: Tensor, parts: int) -> Tensor:
    """Collect the values of each square of parts × parts cells: (B, gh, gw) -> (B, gh/parts, gw/parts, parts²)."""
    squares = grid_map.unflatten(1, (-1, parts)).unflatten(3, (-1, parts))  # (B, rows, parts, columns, parts)
    return squares.transpose(2, 3).flatten(3)


def count_hidden(units: int, ratio: float | tuple[float, float], draw: float) -> int:
    """Return how many units to hide. At least one unit is hidden, and at least one stays visible.

    Args:
        units: Number of units of an image.
        ratio: Fraction to hide, or the range of the fraction.
        draw: Random number in [0, 1) that chooses the fraction from a range.
    """
    low, high = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    return min(max(round(units * (low + (high - low) * draw)), 1), units - 1)


def lowest(values: Tensor, count: int) -> Tensor:
    """Return a bool tensor that is True at the `count` lowest values of each image: (B, ...) -> (B, ...).

    Of equal values, the first ones in raster order count as lowest.
    """
    flat = values.flatten(1)
    chosen = flat.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, True).view(values.shape)


def copy_visible(images: Tensor, where: Tensor, hidden: Tensor, hidden_count: int, noise: Tensor) -> Tensor:
    """Replace some units by random visible units of the same image.

    Args:
        images: Images, (B, C, H, W).
        where: Units to replace, (B, uh, uw) bool.
        hidden: Hidden units, (B, uh, uw) bool.
        hidden_count: Number of hidden units in each image.
        noise: Random numbers in [0, 1) that choose the source of each unit, (B, uh, uw).
    """
    size_px = images.shape[-1] // hidden.shape[-1]
    units = patchify(images, size_px)
    visible = visible_cells(hidden, hidden_count)
    pick = (noise.flatten(1) * visible.shape[1]).long().clamp_max(visible.shape[1] - 1)
    source = visible.gather(1, pick).unsqueeze(-1).expand_as(units)
    mixed = torch.where(where.flatten(1).unsqueeze(-1), units.gather(1, source), units)
    return unpatchify(mixed, size_px, (hidden.shape[1], hidden.shape[2]))


def sincos_positions(grid: tuple[int, int], dim: int, device: torch.device | None = None) -> Tensor:
    """Return fixed 2-D sine-cosine position embeddings.

    The first half of the channels encodes the column, the second half the row. Each half has sines first, then cosines,
    with temperature 10,000. Source: MAE (He et al. 2022), appendix A.1 and its published code, after the 1-D form of
    Vaswani et al. 2017, section 3.5.

    Args:
        grid: Grid of cells, (rows, columns).
        dim: Width of an embedding, a multiple of 4.
        device: Device of the embeddings.

    Returns:
        Position embeddings, (N, dim) float32.

    Raises:
        ValueError: If `dim` is not a multiple of 4.
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
    """Return the width of a light decoder.

    Args:
        encoder_dim: Width of the encoder.
        dim: Requested width. None means half of the encoder's width, rounded down to a multiple of 4 and of `num_heads`
            (a guess, after MAE's decoder of 512 for an encoder of 1024).
        num_heads: Number of the decoder's attention heads.

    Raises:
        ValueError: If `dim` is not a multiple of 4 (for sine-cosine positions) and of `num_heads`.
    """
    step = math.lcm(4, num_heads)
    if dim is None:
        return max(encoder_dim // 2 // step, 1) * step
    if dim % step:
        raise ValueError(f"dim must be a multiple of 4 and of num_heads ({num_heads}); got {dim}")
    return dim
