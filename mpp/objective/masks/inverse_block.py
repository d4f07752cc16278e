"""One block stays visible, and the rest is hidden (data2vec 2.0, Baevski et al. 2023, section 3.4: inverse block)."""

from __future__ import annotations

import math

import numpy as np

from mpp.objective.interfaces import Mask
from mpp.recipe.values import Aspect, Bool, PositiveInt, Ratio


class InverseBlockMask(Mask):
    """Keep one rectangle of random aspect ratio visible, with an exact number of units.

    data2vec 2.0 keeps several overlapping blocks and adjusts the number of units at random. This mask keeps one block,
    whose first or last row is trimmed.

    Args:
        ratio: Fraction of the units to hide, exact after rounding (data2vec 2.0: 0.8 for ViT-B). A range [a, b] is
            drawn for each batch.
        max_aspect: Largest aspect ratio. The rectangle's ratio is in [1 / max_aspect, max_aspect] (a guess).
        roll: Let the rectangle wrap around the edges, so that every unit is visible equally often. Otherwise, units in
            the middle are visible more often.
        unit_px: Side of a mask unit in pixels. Default: the encoder's stride.
    """

    def __init__(
        self,
        *,
        ratio: Ratio = 0.8,
        max_aspect: Aspect = 1.5,
        roll: Bool = True,
        unit_px: PositiveInt | None = None,
    ) -> None:
        self.ratio, self.max_aspect, self.roll, self.unit_px = ratio, max_aspect, roll, unit_px

    def __call__(self, grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
        gh, gw = grid
        visible = gh * gw - count
        spread = abs(math.log(self.max_aspect))
        aspect = math.exp(rng.uniform(-spread, spread))
        # choose a width at which the block fits into the grid's height, then as many rows as the block needs
        w = min(max(round(math.sqrt(visible / aspect)), -(-visible // gh)), gw)
        h = -(-visible // w)
        block = (np.arange(h * w) < visible).reshape(h, w)
        if rng.random() < 0.5:
            block = block[::-1]  # the trimmed row is the first or the last
        mask = np.ones(grid, dtype=bool)
        mask[:h, :w] = ~block
        if self.roll:
            return np.roll(mask, (rng.integers(gh), rng.integers(gw)), (0, 1))
        return np.roll(mask, (rng.integers(gh - h + 1), rng.integers(gw - w + 1)), (0, 1))
