"""Hidden cells never enter the encoder (MAE, He et al. 2022, section 3); the head brings its own mask token."""

from __future__ import annotations

from torch import Tensor, nn

from mpp.patches import blank_hidden
from mpp.types import Cells, EncoderInput


class DropCorruption(nn.Module):
    """Only visible tokens are encoded. Needs a head that reads them: `transformer` or `cross_attention`."""

    hidden_enter = False

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, images: Tensor, cells: Cells) -> EncoderInput:
        return EncoderInput(blank_hidden(images, cells.hidden), cells)
