"""Units hidden uniformly at random (MAE, He et al. 2022, section 3; SimMIM, Xie et al. 2022, section 3.2)."""

from __future__ import annotations

import numpy as np

from mpp.objective.grid import count_hidden
from mpp.objective.interfaces import Mask
from mpp.recipe.values import PositiveInt, Ratio


class UniformMask(Mask):
    """`ratio`: part of the units hidden, rounded, at least one hidden and one visible; a range is drawn per batch.

    `unit_px`: side of a mask unit in pixels (None: the encoder's stride).
    Default ratio 0.6 and 32 px units are SimMIM's for token prediction, 0.75 is MAE's.
    """

    def __init__(self, *, ratio: Ratio = 0.6, unit_px: PositiveInt | None = None) -> None:
        self.ratio, self.unit_px = ratio, unit_px

    def count(self, grid: tuple[int, int], draw: float) -> int:
        return count_hidden(grid[0] * grid[1], self.ratio, draw)

    def __call__(self, grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
        n = grid[0] * grid[1]
        mask = np.zeros(n, dtype=bool)
        mask[rng.permutation(n)[:count]] = True
        return mask.reshape(grid)
