"""Histograms of oriented gradients (MaskFeat, Wei et al. 2022, section 3.1; Dalal & Triggs 2005)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mpp.patches import patchify, repeat_cells, unpatchify
from mpp.types import Images, Int, PositiveInt, TargetContext

Bins = Annotated[Int, Field(ge=2)]
GLYPH_PX = 16  # least side of the drawing of a square
EPSILON = 1e-5  # in the normalisation, as Dalal & Triggs' L2 norm has it: sqrt(|v|² + ε²)


class HogTarget(nn.Module):
    """For each channel, histograms of unsigned gradient directions over squares of the cell, each of length 1.

    `orientations`: bins over 180 degrees (MaskFeat: 9).
    `square_px`: side of the squares (MaskFeat: 8); None: 8, or the cell where that is smaller or no multiple of 8.

    Central differences, none at the image's border, weighted by their magnitude, without interpolation between
    bins; pixels in [0, 1], not normalised. MaskFeat's published code smooths by a Gaussian window; not here.
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
        """(B, N, dim). counted: (B, 1, H, W) bool, pixels that vote; None: all."""
        x = raw.float() / 255
        rows, cols = torch.zeros_like(x), torch.zeros_like(x)
        rows[..., 1:-1, :] = x[..., 2:, :] - x[..., :-2, :]
        cols[..., :, 1:-1] = x[..., :, 2:] - x[..., :, :-2]
        angle = torch.atan2(rows, cols) % math.pi
        bins = (angle * (self.orientations / math.pi)).long() % self.orientations
        strength = torch.hypot(rows, cols)
        if counted is not None:
            strength = strength * counted
        votes = [F.avg_pool2d(strength * (bins == k), self.square_px) for k in range(self.orientations)]
        squares = torch.stack(votes, dim=2)
        length = (squares.square().sum(2, keepdim=True) + EPSILON**2).sqrt()
        return patchify((squares / length).flatten(1, 2), self.side)

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """The mean of each image's visible cells; pixels whose differences reach into hidden cells do not vote."""
        pixels = repeat_cells(hidden, self.cell_px).unsqueeze(1)
        beside = F.max_pool2d(pixels.float(), (3, 1), 1, (1, 0)) + F.max_pool2d(pixels.float(), (1, 3), 1, (0, 1))
        values = self._histograms(images.raw.masked_fill(pixels, 0), beside == 0)
        visible = (~hidden).flatten(1).unsqueeze(-1)
        mean = (values * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)
        return mean.expand(-1, values.shape[1], -1)

    def glyphs(self, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, dim) -> (B, 1, k·H, k·W) in [0, 1]: in each square a line along the edges of each bin's gradients.

        As bright as the bin, the mean of the channels; the values of a square have length 1.
        """
        squares = unpatchify(values.float(), self.side, grid)
        bright = squares.unflatten(1, (-1, self.orientations)).mean(1).clamp(0, 1)  # (B, orientations, h, w)
        side = self.square_px * -(-GLYPH_PX // self.square_px)
        offset = torch.arange(side, device=values.device) - (side - 1) / 2
        angle = (torch.arange(self.orientations, device=values.device) + 0.5) * (math.pi / self.orientations)
        across = offset[None, None, :] * angle.cos()[:, None, None] + offset[None, :, None] * angle.sin()[:, None, None]
        inside = (offset[None, :].square() + offset[:, None].square()).sqrt() <= side / 2
        lines = (1.25 - across.abs()).clamp(0, 1) * inside  # (orientations, side, side)
        drawn = (bright[:, :, :, None, :, None] * lines[None, :, None, :, None, :]).amax(1)
        return drawn.flatten(3, 4).flatten(1, 2).unsqueeze(1)

    def picture(self, prediction: Tensor, images: Images, hidden: Tensor, *, borrow: bool) -> Tensor | None:
        return None
