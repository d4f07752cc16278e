"""Mean colours of cells as classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mpp.encoders.cells import patchify


def mean_patches(raw: Tensor, cell_px: int, side: int) -> Tensor:
    """Compute mean colours of `side` × `side` parts of each cell.

    Args:
        raw: Images as read, (B, C, H, W) uint8. Normalised pixels would fall into other bins, or none.
        cell_px: Side of a cell in pixels.
        side: Number of parts along the side of a cell.

    Returns:
        Mean colours, (B, N, side², C) float32 in [0, 255].

    Raises:
        ValueError: If the pixels are not uint8.
    """
    if raw.dtype != torch.uint8:
        raise ValueError(f"colours are taken from uint8 pixels, as they were read; got {raw.dtype}")
    b, c = raw.shape[:2]
    means = F.avg_pool2d(raw.float(), cell_px // side)
    cells = patchify(means, side)  # (B, N, C·side²)
    return cells.view(b, -1, c, side * side).transpose(2, 3)


def colour_classes(means: Tensor, bits: int) -> Tensor:
    """Return class numbers of colours: (..., C) in [0, 255] -> (...) int64.

    A class number consists of the highest `bits` bits of each channel, with the first channel in the highest place.
    """
    bins = (means * (2**bits / 256)).long()
    place = 2 ** (bits * torch.arange(means.shape[-1] - 1, -1, -1, device=means.device))
    return (bins * place).sum(-1)


def colours(classes: Tensor, bits: int, channels: int) -> Tensor:
    """Return the middles of the bins of `colour_classes`: (...) int64 -> (..., channels) float32 in [0, 1]."""
    places = bits * torch.arange(channels - 1, -1, -1, device=classes.device)
    bins = (classes.unsqueeze(-1) >> places) & (2**bits - 1)
    return (bins.float() + 0.5) / 2**bits


def count_colours(bits: int, channels: int) -> int:
    """Return the number of colour classes with `bits` bits per channel.

    Raises:
        ValueError: If there are more than 65,536 classes.
    """
    if bits * channels > 16:
        raise ValueError(f"bits: {bits} for {channels} channels makes more than 65,536 classes")
    return 2 ** (bits * channels)


def colour_parts(logits: Tensor, bits: int, channels: int, side: int, cell_px: int) -> Tensor:
    """Return pixels from logits: (B, N, side²·classes) -> (B, N, C·cell_px²) in [0, 1].

    Each part of a cell gets the colour in the middle of its most likely bin.
    """
    likeliest = logits.unflatten(-1, (side * side, -1)).argmax(-1)
    parts = colours(likeliest, bits, channels).unflatten(2, (side, side)).movedim(-1, 2)  # (B, N, C, side, side)
    zoom = cell_px // side
    return parts.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1).flatten(2)


def marginal_logits(classes: Tensor, hidden: Tensor, count: int) -> Tensor:
    """Return the log frequencies of classes over the visible cells of all images, the same for every cell.

    One is added to the count of every class (Laplace), so that no class has probability zero.

    Args:
        classes: Class numbers, (B, N, K) int64.
        hidden: Hidden cells, (B, N) or (B, gh, gw) bool.
        count: Number of classes.

    Returns:
        Logits, (B, N, K·count) float32.
    """
    seen = classes[~hidden.flatten(1)]
    histogram = torch.bincount(seen.flatten(), minlength=count).float() + 1
    logits = (histogram / histogram.sum()).log()
    return logits.repeat(classes.shape[2]).expand(*classes.shape[:2], -1)
