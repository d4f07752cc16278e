"""A learnable mask token replaces hidden cells, at the stem or at a later block."""

from __future__ import annotations

import torch
from torch import nn

from mpp.data.batch import Images, Units
from mpp.encoders.cells import Corrupted
from mpp.objective.grid import blank_hidden
from mpp.objective.interfaces import Corruption, CorruptionContext
from mpp.recipe.values import NonNegativeInt


class TokenCorruption(Corruption):
    """Replace hidden patches by learnable mask tokens.

    Args:
        enter: Encoder block at whose input the mask tokens join the visible ones. 0 means at the stem (BERT, Devlin et
            al. 2019, section 3.1; SimMIM, Xie et al. 2022, section 3.1). If it is above 0, only visible tokens pass
            through the first blocks, which is faster. Only cells to be predicted join later (our variant, between
            SimMIM and MAE).
    """

    hidden_enter = True
    mechanism = "token"

    def __init__(self, context: CorruptionContext, *, enter: NonNegativeInt = 0) -> None:
        super().__init__()
        self.enter = enter
        self.mask_token = nn.Parameter(torch.empty(context.dim))
        nn.init.normal_(self.mask_token, std=0.02)  # as in SimMIM's and BEiT's published code

    def forward(self, images: Images, units: Units) -> Corrupted:
        return Corrupted(blank_hidden(images.normalised, units.hidden), self.mask_token, units.hidden, self.enter)
