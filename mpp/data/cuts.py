"""Crops resized and flipped where the model runs: a loader then decodes and cuts, a quarter less work for photographs.

Cut-outs travel as they are, one after another; the device lays them out and resamples them by products with matrices of
bicubic weights, those of Pillow and torch with antialias (Keys 1981, a = -0.5, widened where it shrinks).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpp.data.decode import Cut
from mpp.types import Batch, Cuts

LONGEST = 3
"""A cut-out's side over the target's; longer ones, which decoders do not shrink (PNG), are resized by the loader."""
AT_ONCE = 32
"""Images resampled at once: their pixels lie in memory as float32."""


def fits(cut: Cut, size: tuple[int, int]) -> bool:
    """Whether the device is to resize a cut-out to (H, W); it lays all of a batch out as large as the largest."""
    return cut.pixels.shape[1] <= LONGEST * size[0] and cut.pixels.shape[2] <= LONGEST * size[1]


def packed(cuts: Sequence[Cut], flipped: Sequence[bool]) -> tuple[Tensor, Cuts]:
    """Cut-outs of uint8 and any sizes -> (pixels of all, C), and what is needed to resize them."""
    pixels = torch.cat([cut.pixels.permute(1, 2, 0).reshape(-1, cut.pixels.shape[0]) for cut in cuts])
    sizes = [tuple(cut.pixels.shape[1:]) for cut in cuts]
    table = torch.tensor([(h, w, f) for (h, w), f in zip(sizes, flipped, strict=True)])
    boxes = torch.tensor([cut.box for cut in cuts], dtype=torch.float32)
    return pixels, Cuts(table, boxes, (max(h for h, _ in sizes), max(w for _, w in sizes)))


def finished(batch: Batch, size: tuple[int, int]) -> Batch:
    """With its images resized to (H, W) and flipped, where its tensors are; the device is asked for nothing."""
    if batch.cuts is not None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # images are the same whatever the run's precision
        try:
            batch.images, batch.cuts = resized(batch.images, batch.cuts, size), None
        finally:
            torch.set_float32_matmul_precision(before)
    return batch


def resized(pixels: Tensor, cuts: Cuts, size: tuple[int, int]) -> Tensor:
    """-> (B, C, H, W) uint8."""
    heights, widths, flipped = cuts.table.unbind(1)
    begins = (heights * widths).cumsum(0) - heights * widths
    rows = torch.arange(cuts.largest[0], device=pixels.device).view(1, -1, 1)
    columns = torch.arange(cuts.largest[1], device=pixels.device)
    found = []
    for i in range(0, len(heights), AT_ONCE):
        h, w, begin, flip = (t[i : i + AT_ONCE].view(-1, 1, 1) for t in (heights, widths, begins, flipped))
        top, left, height, width = (t[i : i + AT_ONCE].view(-1, 1, 1) for t in cuts.boxes.unbind(1))
        # beyond an image's own rows and columns stands whatever follows, with a weight of zero
        at = (begin + rows * w + columns).clamp_(max=len(pixels) - 1)
        laid_out = pixels[at].movedim(-1, 1).float()
        down, across = (
            bicubic(top, height, h, size[0], cuts.largest[0]),
            bicubic(left, width, w, size[1], cuts.largest[1]),
        )
        across = torch.where(flip.bool(), across.flip(1), across)
        made = down.unsqueeze(1) @ laid_out @ across.unsqueeze(1).mT
        found.append(made.round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(found)


def bicubic(begin: Tensor, extent: Tensor, length: Tensor, to: int, longest: int) -> Tensor:
    """Weights of each pixel for every new one, (B, to, longest).

    Args:
        begin, extent: Where the crop lies among the pixels, (B, 1, 1).
        length: How many pixels there are, (B, 1, 1).
        to: New pixels.
        longest: The largest length.
    """
    scale = extent / to
    middles = begin + (torch.arange(to, device=length.device) + 0.5).view(-1, 1) * scale
    places = torch.arange(longest, device=length.device)
    x = ((places + 0.5 - middles) / scale.clamp(min=1)).abs()
    weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    weights = weights.masked_fill((x >= 2) | (places >= length), 0)
    return weights / weights.sum(-1, keepdim=True)
