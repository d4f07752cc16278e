"""Histograms of oriented gradients (MaskFeat, Wei et al. 2022, section 3.1; Dalal & Triggs 2005)."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mpp.data.batch import Images
from mpp.encoders.cells import patchify, repeat_cells, unpatchify
from mpp.objective.interfaces import Target, TargetContext
from mpp.recipe.values import Int, PositiveInt

Bins = Annotated[Int, Field(ge=2)]
GLYPH_PX = 16  # smallest side of the drawing of a square, in pixels
EPSILON = 1e-3
"""The ε of the normalisation by sqrt(|v|² + ε²). It makes a square without gradients zero. Gradients of byte values are
far larger."""


class HogTarget(Target):
    """Predict histograms of oriented gradients (HOG) of each channel, over squares of the cell, each of length 1.

    The histograms are computed as in MaskFeat's published code. Gradients are Sobel gradients of the image, which is
    reflected at its border. Each pixel votes for one bin, with the magnitude of its gradient. Directions are measured
    from the vertical. There is no window.

    Args:
        orientations: Number of bins over 180 degrees (MaskFeat: 9).
        square_px: Side of the squares in pixels (MaskFeat: 8). Default: the side of a cell if it is at most 8 px, else
            the greatest common divisor of 8 and that side.
    """

    of = "values"

    def __init__(
        self,
        context: TargetContext,
        *,
        orientations: Bins = 9,
        square_px: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        if square_px is None:
            square_px = math.gcd(8, context.cell_px) if context.cell_px > 8 else context.cell_px
        if context.cell_px % square_px:
            raise ValueError(f"square_px: must divide the cell, {context.cell_px} px; got {square_px}")
        self.orientations, self.square_px = orientations, square_px
        self.cell_px, self.side = context.cell_px, context.cell_px // square_px
        self.dim = context.channels * orientations * self.side * self.side

    def forward(self, images: Images) -> Tensor:
        return self._histograms(images.raw, None)

    def _histograms(self, raw: Tensor, counted: Tensor | None) -> Tensor:
        """Return histograms (B, N, dim). `counted` has the pixels that vote, (B, 1, H, W) bool; None means all."""
        x = F.pad(raw.float(), (1, 1, 1, 1), mode="reflect")
        rows = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]  # smoothed along columns, (B, C, H, W + 2)
        cols = x[..., :, :-2] + 2 * x[..., :, 1:-1] + x[..., :, 2:]  # smoothed along rows, (B, C, H + 2, W)
        across, down = rows[..., :-2] - rows[..., 2:], cols[..., :-2, :] - cols[..., 2:, :]
        angle = torch.atan2(across, down)
        bins = (angle * (self.orientations / math.pi)).floor_().int().remainder_(self.orientations)
        strength = torch.hypot(across, down)
        if counted is not None:
            strength = strength * counted
        count_votes = self._add_votes if strength.device.type == "cpu" else self._pool_votes
        squares = count_votes(strength, bins)
        length = (squares.square().sum(2, keepdim=True) + EPSILON**2).sqrt()
        return patchify((squares / length).flatten(1, 2), self.side)

    def _pool_votes(self, strength: Tensor, bins: Tensor) -> Tensor:
        """Return the mean vote for each bin in each square, (B, C, orientations, H / square_px, W / square_px).

        Args:
            strength: Vote of each pixel, (B, C, H, W).
            bins: Bin of each pixel, (B, C, H, W) int32.
        """
        votes = [F.avg_pool2d(strength * (bins == k), self.square_px) for k in range(self.orientations)]
        return torch.stack(votes, dim=2)

    def _add_votes(self, strength: Tensor, bins: Tensor) -> Tensor:
        """Return the same as `_pool_votes`, which takes twice as long on a CPU.

        On a GPU, these sums have no fixed order, so a run would not repeat exactly.
        """
        batch, channels, height, width = strength.shape
        side = self.square_px
        shape = (batch, channels, self.orientations, height // side, width // side)
        numbers = partial(torch.arange, dtype=bins.dtype, device=bins.device)
        square = (numbers(height) // side * shape[-1]).unsqueeze(1) + numbers(width) // side
        first_bins = numbers(0, batch * channels * self.orientations, self.orientations).view(batch, channels, 1, 1)
        index = (bins + first_bins).mul_(shape[-2] * shape[-1]).add_(square)
        sums = strength.new_zeros(math.prod(shape)).index_add_(0, index.flatten(), strength.flatten())
        return sums.view(shape) / side**2

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """Return the mean of each image's visible cells. Pixels whose gradient reads a hidden cell do not vote."""
        pixels = repeat_cells(hidden, self.cell_px).unsqueeze(1)
        reads_hidden = F.max_pool2d(pixels.float(), 3, 1, 1) > 0
        values = self._histograms(images.raw.masked_fill(pixels, 0), ~reads_hidden)
        visible = (~hidden).flatten(1).unsqueeze(-1)
        mean = (values * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)
        return mean.expand(-1, values.shape[1], -1)

    def glyphs(self, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """Draw histograms as lines: (B, N, dim) -> (B, 1, k·H, k·W) in [0, 1].

        In each square, every bin is a line along the edges that it counts. A line is as bright as its bin, averaged
        over channels. The values of a square have length 1.
        """
        squares = unpatchify(values.float(), self.side, grid)
        bright = squares.unflatten(1, (-1, self.orientations)).mean(1).clamp(0, 1)  # (B, orientations, h, w)
        side = self.square_px * -(-GLYPH_PX // self.square_px)
        offset = torch.arange(side, device=values.device) - (side - 1) / 2
        angle = (torch.arange(self.orientations, device=values.device) + 0.5) * (math.pi / self.orientations)
        across = offset[None, None, :] * angle.sin()[:, None, None] + offset[None, :, None] * angle.cos()[:, None, None]
        inside = (offset[None, :].square() + offset[:, None].square()).sqrt() <= side / 2
        lines = (1.25 - across.abs()).clamp(0, 1) * inside  # (orientations, side, side)
        drawn = (bright[:, :, :, None, :, None] * lines[None, :, None, :, None, :]).amax(1)
        return drawn.flatten(3, 4).flatten(1, 2).unsqueeze(1)
