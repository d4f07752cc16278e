"""Masks of one image that show different units (CoMA, Li et al. 2025, arXiv:2511.05929)."""

from __future__ import annotations

import numpy as np

from mpp.objective.interfaces import Mask
from mpp.recipe.values import PositiveInt, Ratio


class ComplementaryMask(Mask):
    """Show every unit of an image about equally often over its masks (`masks_per_image`).

    The units are put in a random order, and each mask shows the units that follow those of the mask before it. No unit
    is shown twice before all units were shown once: at ratio 0.75, four masks show each unit once, but for rounding.
    CoMA has two masks of ratio 0.5. With one mask per image, this is the same as `uniform`.

    Args:
        ratio: Fraction of the units to hide, rounded; at least one unit is hidden and one visible. A range [a, b] is
            drawn for each batch.
        unit_px: Side of a mask unit in pixels. Default: the encoder's stride.
    """

    def __init__(self, *, ratio: Ratio = 0.75, unit_px: PositiveInt | None = None) -> None:
        self.ratio, self.unit_px = ratio, unit_px

    def __call__(self, grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
        return self.draw_several(grid, count, 1, rng)[0]

    def draw_several(self, grid: tuple[int, int], count: int, masks: int, rng: np.random.Generator) -> np.ndarray:
        n = grid[0] * grid[1]
        order, shown = rng.permutation(n), n - count
        hidden = np.ones((masks, n), dtype=bool)
        for mask in range(masks):
            hidden[mask, order[np.arange(mask * shown, (mask + 1) * shown) % n]] = False
        return hidden.reshape(masks, *grid)
