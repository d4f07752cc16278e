"""Hidden pixels are zero after normalisation, nothing else: what tutorials on masked images do."""

from __future__ import annotations

from torch import Tensor, nn

from mpp.patches import blank_hidden
from mpp.types import Corrupted, CorruptionContext, Images, Units


class ZerosCorruption(nn.Module):
    """The mean colour stands at hidden units; the encoder is not told which they are."""

    hidden_enter = True
    mechanism = "pixel"

    def __init__(self, context: CorruptionContext) -> None:
        super().__init__()

    def forward(self, images: Images, units: Units) -> Corrupted:
        return Corrupted(blank_hidden(images.normalised, units.hidden))

    def kept(self, units: Units) -> Tensor | None:
        return None
