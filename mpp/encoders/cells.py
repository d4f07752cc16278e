"""Cells of an image: which are hidden, what the encoder gets and gives for them, and how they tile it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass
class Cells:
    """Which cells of a batch are hidden and which of those are predicted."""

    hidden: Tensor
    """(B, gh, gw) bool."""
    visible: Tensor
    """(B, V) int64, raster numbers, ascending."""
    predicted: Tensor
    """(B, P) int64, raster numbers, ascending; all hidden cells or a part of them."""

    @property
    def grid(self) -> tuple[int, int]:
        return self.hidden.shape[1], self.hidden.shape[2]

    @property
    def some_predicted(self) -> bool:
        """Whether there are cells that are not."""
        return self.predicted.shape[1] < self.hidden[0].numel()


@dataclass
class Corrupted:
    """What a corruption makes of a batch, for the encoder."""

    images: Tensor
    """(B, C, H, W) float; nothing of hidden units is left in it, unless the corruption says it keeps some."""
    mask_token: Tensor | None = None
    """(D,) the learnable token at `replaced` cells, or of cells that join; None: only pixels are changed."""
    replaced: Tensor | None = None
    """(B, uh, uw) bool: units whose stem output the mask token takes the place of."""
    enter: int | None = 0
    """0: hidden cells are in the encoder from its stem on; k: as mask tokens from block k on; None: never."""


@dataclass
class EncoderOutput:
    """Tokens of the encoder's last block, before its final norm; class and register tokens apart, as `prefix`.

    layout "raster": N tokens, all cells in raster order.
    layout "visible": V tokens. layout "visible+predicted": V tokens, then P. layout "predicted": P tokens, which is
    all that is there for heads that read no others.
    """

    tokens: Tensor
    cells: Cells
    layout: Literal["raster", "visible", "visible+predicted", "predicted"]
    prefix: Tensor | None = None
    """(B, K, D): class and register tokens of the last block; None for encoders that have none."""

    def visible(self) -> Tensor:
        """(B, V, D)"""
        if self.layout == "raster":
            return gather_cells(self.tokens, self.cells.visible)
        assert self.layout != "predicted", "a head that reads visible cells has reads_visible = True"
        return self.tokens[:, : self.cells.visible.shape[1]]

    def predicted(self) -> Tensor | None:
        """(B, P, D), or None where hidden cells never entered the encoder."""
        if self.layout == "raster":
            return gather_cells(self.tokens, self.cells.predicted)
        if self.layout == "visible":
            return None
        if self.layout == "predicted":
            return self.tokens
        return self.tokens[:, self.cells.visible.shape[1] :]


def gather_cells(x: Tensor, cells: Tensor) -> Tensor:
    """(B, N, K) and (B, P) int64 -> (B, P, K)."""
    return x.gather(1, cells.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def patchify(images: Tensor, size_px: int) -> Tensor:
    """Cut images into cells: (B, C, H, W) -> (B, N, C·size_px²), in raster order, channels first within a cell.

    Raises:
        ValueError: H or W is no multiple of size_px.
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
