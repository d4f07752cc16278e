"""Hidden pixels are zero after normalisation (Context Encoders, Pathak et al. 2016)."""

from __future__ import annotations

from mpp.data.batch import Images, Units
from mpp.encoders.cells import Corrupted
from mpp.objective.grid import blank_hidden
from mpp.objective.interfaces import Corruption, CorruptionContext


class ZerosCorruption(Corruption):
    """Replace hidden pixels by the mean colour. The hidden pixels are not marked for the encoder."""

    hidden_enter = True
    mechanism = "pixel"

    def __init__(self, context: CorruptionContext) -> None:
        super().__init__()

    def forward(self, images: Images, units: Units) -> Corrupted:
        return Corrupted(blank_hidden(images.normalised, units.hidden))
