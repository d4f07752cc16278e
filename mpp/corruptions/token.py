"""A learnable mask token stands at hidden cells, from the stem or joining at a later block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpp.patches import blank_hidden
from mpp.types import Cells, EncoderInput, NonNegativeInt


class TokenCorruption(nn.Module):
    """`enter`: the encoder block at whose input the mask tokens join the visible ones.

    0 puts them in at the stem (BERT, Devlin et al. 2019, section 3.1; SimMIM, Xie et al. 2022, section 3.1).
    Above 0 only visible tokens run through the first blocks, and only the cells to be predicted join: cheaper
    by the blocks they skip (our own; between SimMIM and MAE).
    """

    hidden_enter = True

    def __init__(self, dim: int, *, enter: NonNegativeInt = 0) -> None:
        super().__init__()
        self.enter = enter
        self.mask_token = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.mask_token, std=0.02)  # SimMIM's and BEiT's published codes

    def forward(self, images: Tensor, cells: Cells) -> EncoderInput:
        return EncoderInput(blank_hidden(images, cells.hidden), cells, self.mask_token, self.enter)
