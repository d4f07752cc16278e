"""Hidden cells never enter the encoder (MAE, He et al. 2022, section 3). The head has its own mask token."""

from __future__ import annotations

from mpp.data.batch import Images, Units
from mpp.encoders.cells import Corrupted
from mpp.objective.grid import blank_hidden
from mpp.objective.interfaces import Corruption, CorruptionContext


class DropCorruption(Corruption):
    """Encode the visible patches only. The head must be one that reads them: `transformer` or `cross_attention`."""

    hidden_enter = False
    mechanism = "drop"

    def __init__(self, context: CorruptionContext) -> None:
        super().__init__()

    def forward(self, images: Images, units: Units) -> Corrupted:
        return Corrupted(blank_hidden(images.normalised, units.hidden), enter=None)
