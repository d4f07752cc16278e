"""Randomness as a pure function of (seed, purpose, position).

Nothing random in the toolkit depends on a worker, a rank or what ran before, so a run can stop anywhere and
continue with any number of processes. Philox is counter-based: making a generator costs microseconds.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np


class Purpose(IntEnum):
    """Independent streams of one seed. Numbers are part of every recorded result: never renumber."""

    CROP = 1
    MASK = 2
    NOISE = 3
    SHARDS = 4
    WINDOW = 5
    STEP = 6
    AUGMENT = 7
    MIX = 8
    SUBSET = 9
    INIT = 10
    PACK = 11
    RATIO = 12
    TUNE = 13
    PROBE = 14
    BALANCE = 15
    WEAK = 16
    STRONG = 17


def stream(seed: int, purpose: Purpose, position: int = 0) -> np.random.Generator:
    """Return the random generator of one purpose at one position.

    Args:
        seed: Of the run, below 2**56.
        purpose: What is drawn.
        position: 0 or more.
    """
    return np.random.Generator(_philox(seed, purpose, position))


def _philox(seed: int, purpose: Purpose, position: int) -> np.random.Philox:
    # typed here: of a list with numbers on both sides of 2**63 numpy makes floats, and rounds
    return np.random.Philox(key=np.array([(seed << 8) | purpose, position], np.uint64))


class Streams:
    """`stream` of one seed and purpose at many positions, for code that is called for every image.

    One generator, set to each position: a sixth of the time that a new one takes. What `at` gave before is not to be
    used any more then.
    """

    def __init__(self, seed: int, purpose: Purpose) -> None:
        self._philox = _philox(seed, purpose, 0)
        self._generator = np.random.Generator(self._philox)
        self._state: Any = self._philox.state  # as it is before the first draw

    def at(self, position: int) -> np.random.Generator:
        self._state["state"]["key"][1] = position
        self._philox.state = self._state
        return self._generator


def torch_seed(seed: int, purpose: Purpose, position: int = 0) -> int:
    """Return what `stream` would draw from as a seed for torch's, numpy's or Python's global generators."""
    return int(stream(seed, purpose, position).integers(2**63 - 1))
