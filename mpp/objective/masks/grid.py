"""A regular grid of units stays visible (MAE, He et al. 2022, figure 6: one of every four)."""

from __future__ import annotations

import numpy as np

from mpp.objective.interfaces import Mask
from mpp.recipe.values import PositiveInt


class GridMask(Mask):
    """Keep one unit of every square of units visible. The offset of the grid is drawn for each image.

    Args:
        period: Side of the squares in units. 2 hides 3 of 4 units. Only whole squares count, so that every image hides
            the same number of units.
        unit_px: Side of a mask unit in pixels. Default: the encoder's stride.
    """

    def __init__(self, *, period: PositiveInt = 2, unit_px: PositiveInt | None = None) -> None:
        if period < 2:
            raise ValueError(f"period: 2 or more, or nothing is hidden; got {period}")
        self.period, self.unit_px = period, unit_px

    def _visible(self, side: int) -> int:
        return max(side // self.period, 1)

    def count(self, grid: tuple[int, int], draw: float) -> int:
        return grid[0] * grid[1] - self._visible(grid[0]) * self._visible(grid[1])

    def __call__(self, grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
        mask = np.ones(grid, dtype=bool)
        rows, cols = (
            rng.integers(side - self.period * (self._visible(side) - 1)) + self.period * np.arange(self._visible(side))
            for side in grid
        )
        mask[np.ix_(rows, cols)] = False
        return mask
