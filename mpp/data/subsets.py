"""Choose images of a labeled set: a fraction, a balanced set, a split."""

from __future__ import annotations

import numpy as np

from mpp.rng import Purpose, stream


def draw_fraction(images: int, fraction: float | None, seed: int) -> np.ndarray:
    """Draw a fraction of all images, at least one, and return their numbers, ascending.

    Args:
        images: Number of all images.
        fraction: Fraction to draw. None means all images.
        seed: Seed of the draw.
    """
    if fraction is None:
        return np.arange(images)
    return np.sort(stream(seed, Purpose.SUBSET).permutation(images)[: max(round(images * fraction), 1)])


def split(strata: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split each stratum into images to fit to and images to choose settings by; a pure function of its arguments.

    Args:
        strata: (n,): stratum of each image.
        fraction: Fraction of each stratum that is used to choose settings.
        seed: Seed of the draw.

    Returns:
        (fit, tune): indexes into `strata`, ascending. `fit` has at least one image of each stratum.
    """
    rng, tune = stream(seed, Purpose.TUNE), []
    for label in np.unique(strata):
        members = np.flatnonzero(strata == label)
        take = min(max(round(fraction * len(members)), 1), len(members) - 1)
        tune.append(rng.permutation(members)[:take])
    chosen = np.sort(np.concatenate(tune))
    return np.setdiff1d(np.arange(len(strata)), chosen), chosen


def balanced(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return indexes into `labels`, with repetitions, so that each class in it occurs as often as the largest one.

    All members of a class are repeated equally often. If the number does not divide evenly, the rest is drawn.
    """
    rng, most, chosen = stream(seed, Purpose.BALANCE), np.bincount(labels).max(), []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rounds, rest = divmod(most, len(members))
        chosen += [np.tile(members, rounds), rng.permutation(members)[:rest]]
    return np.sort(np.concatenate(chosen))
