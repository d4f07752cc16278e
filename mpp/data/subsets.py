"""Choose images of a labeled set: a fraction, a balanced set, a split."""

from __future__ import annotations

import numpy as np

from mpp.rng import Purpose, stream


def draw_fraction(images: int, fraction: float | None, seed: int) -> np.ndarray:
    """Numbers of so large a part of all images, one at least, ascending; None: all."""
    if fraction is None:
        return np.arange(images)
    return np.sort(stream(seed, Purpose.SUBSET).permutation(images)[: max(round(images * fraction), 1)])


def split(strata: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split each stratum into images to fit to and images to choose settings by; a pure function of its arguments.

    Args:
        strata: (n,) the stratum of each image.
        fraction: Of each stratum that is for choosing.
        seed: Of the draw.

    Returns:
        (fit, tune): places in `strata`, ascending; of each stratum one at least in `fit`.
    """
    rng, tune = stream(seed, Purpose.TUNE), []
    for label in np.unique(strata):
        members = np.flatnonzero(strata == label)
        take = min(max(round(fraction * len(members)), 1), len(members) - 1)
        tune.append(rng.permutation(members)[:take])
    chosen = np.sort(np.concatenate(tune))
    return np.setdiff1d(np.arange(len(strata)), chosen), chosen


def balanced(labels: np.ndarray, seed: int) -> np.ndarray:
    """Places in `labels`, with repetitions, such that every class that occurs comes as often as the largest does.

    Members of a class come equally often, but for the last round, which is drawn.
    """
    rng, most, chosen = stream(seed, Purpose.BALANCE), np.bincount(labels).max(), []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rounds, rest = divmod(most, len(members))
        chosen += [np.tile(members, rounds), rng.permutation(members)[:rest]]
    return np.sort(np.concatenate(chosen))
