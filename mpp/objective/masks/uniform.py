"""Units hidden uniformly at random (MAE, He et al. 2022, section 3; SimMIM, Xie et al. 2022, section 3.2)."""

from __future__ import annotations

import numpy as np

from mpp.objective.interfaces import Mask
from mpp.recipe.values import PositiveInt, Ratio


class UniformMask(Mask):
    """Hide units at random, each with the same probability.

    Ratio 0.6 and units of 32 px are SimMIM's for token prediction; ratio 0.75 is MAE's.

    Args:
        ratio: Fraction of the units to hide, rounded; at least one unit is hidden and one visible. A range [a, b] is
            drawn for each batch.
        unit_px: Side of a mask unit in pixels. Default: the encoder's stride.
    """

    def __init__(self, *, ratio: Ratio = 0.6, unit_px: PositiveInt | None = None) -> None:
        self.ratio, self.unit_px = ratio, unit_px

    def __call__(self, grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
        n = grid[0] * grid[1]
        mask = np.zeros(n, dtype=bool)
        mask[rng.permutation(n)[:count]] = True
        return mask.reshape(grid)
