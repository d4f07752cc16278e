"""Cells of an image: which are hidden, input and output of the encoder for them, and how they tile the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass
class Cells:
    """Hidden, visible and predicted cells of a batch."""

    hidden: Tensor
    """(B, gh, gw) bool."""
    visible: Tensor
    """(B, V) int64, raster numbers in ascending order."""
    predicted: Tensor
    """(B, P) int64, raster numbers in ascending order. All hidden cells, or a part of them."""

    @property
    def grid(self) -> tuple[int, int]:
        return self.hidden.shape[1], self.hidden.shape[2]

    @property
    def some_predicted(self) -> bool:
        """Whether some cells are not predicted."""
        return self.predicted.shape[1] < self.hidden[0].numel()


@dataclass
class Corrupted:
    """Output of a corruption for one batch, and input of the encoder."""

    images: Tensor
    """(B, C, H, W) float. Contains no pixels of hidden units, except units that the corruption's `kept` returns."""
    mask_token: Tensor | None = None
    """(D,) learnable token for cells that are replaced at the stem or join later. None if there is no such token."""
    replaced: Tensor | None = None
    """(B, uh, uw) bool: units whose stem output is replaced by the mask token."""
    enter: int | None = 0
    """When hidden cells enter the encoder. 0: at the stem. k: as mask tokens at block k. None: never."""


@dataclass
class EncoderOutput:
    """Tokens of the encoder's last block, before its final norm. Class and register tokens are separate, in `prefix`.

    `tokens` depends on the layout:

        raster               N tokens, all cells in raster order
        visible              V tokens
        visible+predicted    V tokens, then P tokens
        predicted            P tokens, if no head reads others
    """

    tokens: Tensor
    cells: Cells
    layout: Literal["raster", "visible", "visible+predicted", "predicted"]
    prefix: Tensor | None = None
    """(B, K, D): class and register tokens of the last block. None if the encoder has none."""

    def visible(self) -> Tensor:
        """Return the tokens of visible cells, (B, V, D)."""
        if self.layout == "raster":
            return gather_cells(self.tokens, self.cells.visible)
        assert self.layout != "predicted", "a head that reads visible cells has reads_visible = True"
        return self.tokens[:, : self.cells.visible.shape[1]]

    def predicted(self) -> Tensor | None:
        """Return the tokens of predicted cells, (B, P, D), or None if hidden cells never entered the encoder."""
        if self.layout == "raster":
            return gather_cells(self.tokens, self.cells.predicted)
        if self.layout == "visible":
            return None
        if self.layout == "predicted":
            return self.tokens
        return self.tokens[:, self.cells.visible.shape[1] :]


def gather_cells(x: Tensor, cells: Tensor) -> Tensor:
    """Return the values at some cells: (B, N, K) and cells (B, P) int64 -> (B, P, K)."""
    return x.gather(1, cells.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def patchify(images: Tensor, size_px: int) -> Tensor:
    """Cut images into cells: (B, C, H, W) -> (B, N, C·size_px²), in raster order, channels first within a cell.

    Raises:
        ValueError: If H or W is not a multiple of size_px.
    """
    b, c, h, w = images.shape
    if h % size_px or w % size_px:
        raise ValueError(f"an image of {h}×{w} px has no whole patches of {size_px} px")
    gh, gw = h // size_px, w // size_px
    x = images.reshape(b, c, gh, size_px, gw, size_px)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, gh * gw, c * size_px * size_px)


def patches_at(images: Tensor, size_px: int, cells: Tensor) -> Tensor:
    """Return the output of `patchify` at some cells, without computing the others: (B, P) int64 -> (B, P, C·size_px²).

    The pixels are those of `images`, (B, C, H, W).
    """
    b, c, h, w = images.shape
    gw = w // size_px
    x = images.reshape(b, c, h // size_px, size_px, gw, size_px)
    first = torch.arange(b, device=images.device).unsqueeze(1)
    return x[first, :, cells // gw, :, cells % gw].flatten(2)


def unpatchify(patches: Tensor, size_px: int, grid: tuple[int, int]) -> Tensor:
    """Invert `patchify`: (B, N, C·size_px²) -> (B, C, H, W).

    Raises:
        ValueError: If the patches do not fill the grid.
    """
    b, n, d = patches.shape
    gh, gw = grid
    if n != gh * gw:
        raise ValueError(f"{n} patches do not fill a grid of {gh}×{gw}")
    c = d // (size_px * size_px)
    x = patches.reshape(b, gh, gw, c, size_px, size_px).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c, gh * size_px, gw * size_px)


def repeat_cells(grid_map: Tensor, factor: int) -> Tensor:
    """Repeat each value factor × factor times: (B, gh, gw) -> (B, gh·factor, gw·factor)."""
    if factor == 1:
        return grid_map
    return grid_map.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
