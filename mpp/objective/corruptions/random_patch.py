"""Hidden units show random visible units of the same image (ViT, Dosovitskiy et al. 2021,
appendix B.1.2, one of its three cases)."""

from __future__ import annotations

from mpp.data.batch import NOISE, Images, Units
from mpp.encoders.cells import Corrupted
from mpp.objective.grid import copy_visible
from mpp.objective.interfaces import Corruption, CorruptionContext


class RandomPatchCorruption(Corruption):
    """Replace hidden units by copies of visible units of the same image. The copies reveal nothing of hidden pixels."""

    hidden_enter = True
    mechanism = "pixel"

    def __init__(self, context: CorruptionContext) -> None:
        super().__init__()

    def forward(self, images: Images, units: Units) -> Corrupted:
        source = units.noise[:, NOISE["source"]]
        return Corrupted(copy_visible(images.normalised, units.hidden, units.hidden, units.count, source))
