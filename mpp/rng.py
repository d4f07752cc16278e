"""Randomness as a pure function of (seed, purpose, position).

Random numbers in the toolkit do not depend on a worker, a rank or what ran before. So a run can stop anywhere and
continue with any number of processes. Philox is counter-based: creating a generator costs microseconds.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np


class Purpose(IntEnum):
    """Independent random streams of one seed. Never renumber them: the numbers are part of every recorded result."""

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
        seed: Seed of the run, below 2**56.
        purpose: Purpose of the random numbers.
        position: Position in the stream, 0 or more.
    """
    return np.random.Generator(_philox(seed, purpose, position))


def _philox(seed: int, purpose: Purpose, position: int) -> np.random.Philox:
    # uint64 must be given: numpy would turn a list with numbers on both sides of 2**63 into floats, and round them
    return np.random.Philox(key=np.array([(seed << 8) | purpose, position], np.uint64))


class Streams:
    """`stream` of one seed and purpose at many positions, for code that is called for every image.

    One generator is set to each position, which takes a sixth of the time of creating a new one. Each call of `at`
    invalidates the generators that earlier calls returned.
    """

    def __init__(self, seed: int, purpose: Purpose) -> None:
        self._philox = _philox(seed, purpose, 0)
        self._generator = np.random.Generator(self._philox)
        self._state: Any = self._philox.state  # the state before the first draw

    def at(self, position: int) -> np.random.Generator:
        self._state["state"]["key"][1] = position
        self._philox.state = self._state
        return self._generator


def torch_seed(seed: int, purpose: Purpose, position: int = 0) -> int:
    """Return a seed for the global generators of torch, numpy or Python, drawn from `stream`."""
    return int(stream(seed, purpose, position).integers(2**63 - 1))
