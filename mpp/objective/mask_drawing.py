"""Draw the masks of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mpp.data.batch import NOISE, Units
from mpp.errors import UserError
from mpp.objective.interfaces import Mask
from mpp.rng import Purpose, Streams


def draw_masks(sampler: Mask, grid: tuple[int, int], draw: float, seed: int, positions: Sequence[int]) -> Units:
    """Draw the masks and noise of the samples at these positions.

    Args:
        sampler: The mask.
        grid: (rows, columns) of units.
        draw: As of `Mask.count`.
        seed: Of the run.
        positions: Of the samples in the run's order.

    Raises:
        UserError: A mask hides another number of units than it says.
    """
    count = sampler.count(grid, draw)
    masks, noises = Streams(seed, Purpose.MASK), Streams(seed, Purpose.NOISE)
    hidden = np.stack([sampler(grid, count, masks.at(p)) for p in positions])
    if (hidden.sum((1, 2)) != count).any():
        counts = sorted({int(n) for n in hidden.sum((1, 2))})
        raise UserError(
            f"mask: {type(sampler).__name__} says it hides {count} units of {grid[0]}×{grid[1]}, and hides "
            f"{' or '.join(map(str, counts))}; it must hide as many in every image"
        )
    size = (len(NOISE), *grid)
    noise = np.stack([noises.at(p).random(size, dtype=np.float32) for p in positions])
    return Units(torch.from_numpy(hidden), count, torch.from_numpy(noise))
