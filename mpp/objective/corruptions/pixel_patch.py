"""A learnable patch of pixels replaces hidden units (a guess). This works with every encoder.

It is the mask token of SimMIM (Xie et al. 2022, section 3.2) in pixels, so the encoder needs no stem for tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from mpp.data.batch import Images, Units
from mpp.encoders.cells import Corrupted, repeat_cells
from mpp.objective.interfaces import Corruption, CorruptionContext


class PixelPatchCorruption(Corruption):
    """Replace hidden units by a learned patch of pixels, which starts near the mean colour (std 0.02)."""

    hidden_enter = True
    mechanism = "pixel"

    def __init__(self, context: CorruptionContext) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(context.channels, context.unit_px, context.unit_px))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Images, units: Units) -> Corrupted:
        hidden = repeat_cells(units.hidden, self.mask_token.shape[-1]).unsqueeze(1)
        tiled = self.mask_token.repeat(1, units.hidden.shape[1], units.hidden.shape[2])
        return Corrupted(torch.where(hidden, tiled, images.normalised))
