"""Images as grids of square patches, and back."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def patchify(images: Tensor, size_px: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C·size_px²), cells in raster order, channels first within a patch.

    H and W must be multiples of size_px (ValueError).
    """
    b, c, h, w = images.shape
    if h % size_px or w % size_px:
        raise ValueError(f"an image of {h}×{w} px has no whole patches of {size_px} px")
    gh, gw = h // size_px, w // size_px
    x = images.reshape(b, c, gh, size_px, gw, size_px)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, gh * gw, c * size_px * size_px)


def patches_at(images: Tensor, size_px: int, cells: Tensor) -> Tensor:
    """Of what `patchify` gives only some cells, without making the others: (B, P) int64 -> (B, P, C·size_px²)."""
    b, c, h, w = images.shape
    gw = w // size_px
    x = images.reshape(b, c, h // size_px, size_px, gw, size_px)
    first = torch.arange(b, device=images.device).unsqueeze(1)
    return x[first, :, cells // gw, :, cells % gw].flatten(2)


def unpatchify(patches: Tensor, size_px: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (B, N, C·size_px²) -> (B, C, H, W)."""
    b, n, d = patches.shape
    gh, gw = grid
    if n != gh * gw:
        raise ValueError(f"{n} patches do not fill a grid of {gh}×{gw}")
    c = d // (size_px * size_px)
    x = patches.reshape(b, gh, gw, c, size_px, size_px).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c, gh * size_px, gw * size_px)


def repeat_cells(grid_map: Tensor, factor: int) -> Tensor:
    """(B, gh, gw) -> (B, gh·factor, gw·factor): every cell becomes factor × factor of the same value."""
    if factor == 1:
        return grid_map
    return grid_map.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


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
    """Units to hide of so many, at least one hidden and one visible; a range is entered at `draw` in [0, 1)."""
    low, high = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    return min(max(round(units * (low + (high - low) * draw)), 1), units - 1)


def lowest(values: Tensor, count: int) -> Tensor:
    """(B, ...) -> the same shape, bool: True at the `count` lowest values of each image; ties by place."""
    flat = values.flatten(1)
    chosen = flat.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, True).view(values.shape)


def copy_visible(images: Tensor, where: Tensor, hidden: Tensor, hidden_count: int, noise: Tensor) -> Tensor:
    """Put random visible units of the same image at `where`.

    images (B, C, H, W); where, hidden (B, uh, uw) bool, `hidden_count` hidden in each image; noise (B, uh, uw) in
    [0, 1) chooses the source of each unit.
    """
    size_px = images.shape[-1] // hidden.shape[-1]
    units = patchify(images, size_px)
    visible = visible_cells(hidden, hidden_count)
    pick = (noise.flatten(1) * visible.shape[1]).long().clamp_max(visible.shape[1] - 1)
    source = visible.gather(1, pick).unsqueeze(-1).expand_as(units)
    mixed = torch.where(where.flatten(1).unsqueeze(-1), units.gather(1, source), units)
    return unpatchify(mixed, size_px, (hidden.shape[1], hidden.shape[2]))


def mean_patches(raw: Tensor, cell_px: int, side: int) -> Tensor:
    """Mean colours of `side` × `side` parts of each cell: (B, C, H, W) -> (B, N, side², C) float32 in [0, 255].

    raw: pixels as they were read. ValueError for anything but uint8, whose range is known: normalised pixels
    would fall into other bins, or none.
    """
    if raw.dtype != torch.uint8:
        raise ValueError(f"colours are taken from uint8 pixels, as they were read; got {raw.dtype}")
    b, c = raw.shape[:2]
    means = F.avg_pool2d(raw.float(), cell_px // side)
    cells = patchify(means, side)  # (B, N, C·side²)
    return cells.view(b, -1, c, side * side).transpose(2, 3)


def colour_classes(means: Tensor, bits: int) -> Tensor:
    """(..., C) in [0, 255] -> (...) int64: `bits` of each channel, the first channel highest."""
    bins = (means * (2**bits / 256)).long()
    place = 2 ** (bits * torch.arange(means.shape[-1] - 1, -1, -1, device=means.device))
    return (bins * place).sum(-1)


def colours(classes: Tensor, bits: int, channels: int) -> Tensor:
    """(...) int64 -> (..., channels) float32 in [0, 1]: the middles of the bins of `colour_classes`."""
    places = bits * torch.arange(channels - 1, -1, -1, device=classes.device)
    bins = (classes.unsqueeze(-1) >> places) & (2**bits - 1)
    return (bins.float() + 0.5) / 2**bits


def count_colours(bits: int, channels: int) -> int:
    """Classes of colours of `bits` a channel. ValueError above 65,536."""
    if bits * channels > 16:
        raise ValueError(f"bits: {bits} for {channels} channels makes more than 65,536 classes")
    return 2 ** (bits * channels)


def colour_parts(logits: Tensor, bits: int, channels: int, side: int, cell_px: int) -> Tensor:
    """(B, N, side²·classes) -> (B, N, C·cell_px²) in [0, 1]: each part of a cell in the middle of its likeliest bin."""
    likeliest = logits.unflatten(-1, (side * side, -1)).argmax(-1)
    parts = colours(likeliest, bits, channels).unflatten(2, (side, side)).movedim(-1, 2)  # (B, N, C, side, side)
    zoom = cell_px // side
    return parts.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1).flatten(2)


def marginal_logits(classes: Tensor, hidden: Tensor, count: int) -> Tensor:
    """log of the histogram of `classes` (B, N, K) over visible cells -> (B, N, K·count), the same everywhere.

    One is added to every class (Laplace), so that none is impossible.
    """
    seen = classes[~hidden.flatten(1)]
    histogram = torch.bincount(seen.flatten(), minlength=count).float() + 1
    logits = (histogram / histogram.sum()).log()
    return logits.repeat(classes.shape[2]).expand(*classes.shape[:2], -1)


def sincos_positions(grid: tuple[int, int], dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed 2-D sine-cosine positions, (N, dim) float32; dim must be a multiple of 4 (ValueError).

    The first half of the channels encodes the column, the second half the row, each as sines and then cosines,
    temperature 10,000: MAE (He et al. 2022), appendix A.1 and its published code, after the 1-D form of Vaswani et
    al. 2017, section 3.5.
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
    """Width of a light decoder: `dim`, or half the encoder's rounded down to what positions and heads allow.

    ValueError where `dim` is no multiple of 4 (sine-cosine positions) and of num_heads. Half: a guess,
    after MAE's 512 beside an encoder of 1024.
    """
    step = math.lcm(4, num_heads)
    if dim is None:
        return max(encoder_dim // 2 // step, 1) * step
    if dim % step:
        raise ValueError(f"dim must be a multiple of 4 and of num_heads ({num_heads}); got {dim}")
    return dim


def image_share(values: Tensor) -> float:
    """Part of the energy of (B, N, D) that is left without the mean of each cell over the images, in [0, 1].

    Near 0 the values say nothing of the image, whatever noise lies on them.
    """
    x = values.double()
    return float((x - x.mean(0)).square().sum() / x.square().sum().clamp_min(1e-300))


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised singular values of (M, D) (Roy & Vetterli 2007; RankMe, Garrido 2023).

    Not centred: values that are all the same have rank 1. nan where a value is not finite.
    """
    x = values.double()
    if not bool(x.isfinite().all()):
        return math.nan
    singular = torch.linalg.eigvalsh(x.T @ x).clamp_min(0).sqrt()  # of (D, D), however many rows there are
    share = singular / singular.sum()
    share = share[share > 0]
    return float((-(share * share.log()).sum()).exp())
