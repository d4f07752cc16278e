"""Cells hidden uniformly at random (MAE, He et al. 2022, section 3; SimMIM, Xie et al. 2022, section 3.2)."""

from __future__ import annotations

import numpy as np

from mpp.types import OpenFraction, PositiveInt


class UniformMask:
    """`ratio`: fraction of cells hidden, rounded, at least one hidden and one visible.

    `unit_px`: side of a mask unit in pixels, a multiple of the encoder's stride (None: the stride itself).
    Default ratio 0.6 and 32 px units are SimMIM's for token prediction, 0.75 is MAE's.
    """

    def __init__(self, *, ratio: OpenFraction = 0.6, unit_px: PositiveInt | None = None) -> None:
        self.ratio, self.unit_px = ratio, unit_px

    def __call__(self, grid: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        n = grid[0] * grid[1]
        mask = np.zeros(n, dtype=bool)
        mask[rng.permutation(n)[: min(max(round(n * self.ratio), 1), n - 1)]] = True
        return mask.reshape(grid)
