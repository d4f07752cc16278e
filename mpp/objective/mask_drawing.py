"""Draw the masks of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mpp.data.batch import NOISE, Units
from mpp.errors import UserError
from mpp.objective.interfaces import Mask
from mpp.rng import Purpose, Streams


def draw_masks(
    sampler: Mask, grid: tuple[int, int], draw: float, seed: int, positions: Sequence[int], masks_per_image: int = 1
) -> Units:
    """Draw the masks and noise of the samples at these positions.

    Args:
        sampler: Mask to draw from.
        grid: Grid of mask units, (rows, columns).
        draw: Random number of the batch in [0, 1), see `Mask.count`.
        seed: Seed of the run.
        positions: Positions of the samples in the run's order.
        masks_per_image: Number of masks of each sample. Except for masks that depend on each other, the first one is
            the mask that a sample with one mask has.

    Raises:
        UserError: If the number of hidden units differs from the one that the mask's `count` returns.
    """
    count = sampler.count(grid, draw)
    masks, noises = Streams(seed, Purpose.MASK), Streams(seed, Purpose.NOISE)
    hidden = np.concatenate([sampler.draw_several(grid, count, masks_per_image, masks.at(p)) for p in positions])
    if (hidden.sum((1, 2)) != count).any():
        counts = sorted({int(n) for n in hidden.sum((1, 2))})
        raise UserError(
            f"mask: {type(sampler).__name__} says it hides {count} units of {grid[0]}×{grid[1]}, and hides "
            f"{' or '.join(map(str, counts))}; it must hide as many in every image"
        )
    size = (masks_per_image, len(NOISE), *grid)
    noise = np.concatenate([noises.at(p).random(size, dtype=np.float32) for p in positions])
    return Units(torch.from_numpy(hidden), count, torch.from_numpy(noise))
