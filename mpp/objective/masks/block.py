"""Blockwise masking (BEiT, Bao et al. 2022, section 2.2 and algorithm 1), with an exact count."""

from __future__ import annotations

import math

import numpy as np

from mpp.objective.interfaces import Mask
from mpp.recipe.values import Aspect, PositiveInt, Ratio


class BlockMask(Mask):
    """Hide rectangles of random aspect ratio until enough units are hidden. The last rectangle is trimmed.

    BEiT accepts masks that hide fewer units than asked. Here every mask hides the same number, as dropping hidden
    tokens requires. A rectangle that would hide too many units loses random ones.

    Args:
        ratio: Fraction of the units to hide, exact after rounding (BEiT: 0.4). A range [a, b] is drawn for each batch.
        min_block: Smallest area of a rectangle in units (BEiT: 16 on a 14×14 grid). If fewer units are left to hide,
            their number is used.
        max_aspect: Largest aspect ratio. Rectangles have ratios in [1 / max_aspect, max_aspect] (BEiT: 1 / 0.3).
        unit_px: Side of a mask unit in pixels. Default: the encoder's stride.
    """

    def __init__(
        self,
        *,
        ratio: Ratio = 0.4,
        min_block: PositiveInt = 16,
        max_aspect: Aspect = 1 / 0.3,
        unit_px: PositiveInt | None = None,
    ) -> None:
        self.ratio, self.min_block, self.max_aspect, self.unit_px = ratio, min_block, max_aspect, unit_px

    def __call__(self, grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
        gh, gw = grid
        mask = np.zeros(grid, dtype=bool)
        spread = abs(math.log(self.max_aspect))
        while (left := count - int(mask.sum())) > 0:
            area = rng.uniform(min(self.min_block, left), left)
            aspect = math.exp(rng.uniform(-spread, spread))
            h = min(max(round(math.sqrt(area * aspect)), 1), gh)
            w = min(max(round(math.sqrt(area / aspect)), 1), gw)
            top, side = rng.integers(gh - h + 1), rng.integers(gw - w + 1)
            rows, cols = np.nonzero(~mask[top : top + h, side : side + w])
            keep = rng.permutation(len(rows))[:left]
            mask[top + rows[keep], side + cols[keep]] = True
        return mask
