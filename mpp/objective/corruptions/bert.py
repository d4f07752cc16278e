"""Most hidden units get the mask token, some a random patch, and some stay unchanged (BERT's 80/10/10).

Sources: BERT, Devlin et al. 2019, section 3.1, and for patches ViT, Dosovitskiy et al. 2021, appendix B.1.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpp.data.batch import NOISE, Images, Units
from mpp.encoders.cells import Corrupted
from mpp.objective.grid import blank_hidden, copy_visible, lowest
from mpp.objective.interfaces import Corruption, CorruptionContext
from mpp.recipe.values import Fraction


class BertCorruption(Corruption):
    """Replace most hidden units by mask tokens and some by other patches, keep some, and predict all hidden units.

    Hidden units that are not covered by `random` and `keep` get the learnable mask token at the stem. Both fractions
    are rounded to whole units, the same number in every image. Skill is measured on all hidden units, including kept
    ones, and is therefore a little higher than with `token`.

    Args:
        random: Fraction of the hidden units that show a visible unit of the same image instead.
        keep: Fraction of the hidden units that stay unchanged. The encoder cannot distinguish them from visible units,
            so it must describe every patch.
    """

    hidden_enter = True
    mechanism = "token"

    def __init__(self, context: CorruptionContext, *, random: Fraction = 0.1, keep: Fraction = 0.1) -> None:
        super().__init__()
        if random + keep > 1:
            raise ValueError(f"random + keep: at most 1; got {random} + {keep}")
        if keep == 1:
            raise ValueError("keep: 1 hides nothing; it must be < 1")
        self.random, self.keep = random, keep
        self.mask_token = nn.Parameter(torch.empty(context.dim))
        nn.init.normal_(self.mask_token, std=0.02)

    def _kinds(self, units: Units) -> tuple[Tensor, Tensor]:
        """Return the units that show a copy and the kept units, (B, uh, uw) bool each.

        Of the hidden units, those with the lowest noise are kept, and the next ones show a copy.
        """
        noise = units.noise[:, NOISE["kind"]].masked_fill(~units.hidden, 2.0)
        keep, random = round(self.keep * units.count), round(self.random * units.count)
        kept = lowest(noise, keep)
        return lowest(noise, keep + random) & ~kept, kept

    def forward(self, images: Images, units: Units) -> Corrupted:
        copied, kept = self._kinds(units)
        masked = units.hidden & ~copied & ~kept
        source = units.noise[:, NOISE["source"]]
        pixels = copy_visible(images.normalised, copied, units.hidden, units.count, source)
        return Corrupted(blank_hidden(pixels, masked), self.mask_token, masked)

    def kept(self, units: Units) -> Tensor | None:
        return self._kinds(units)[1]
