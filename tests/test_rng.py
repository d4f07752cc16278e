"""Randomness is a function of (seed, purpose, position)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mpp.rng import Purpose, Streams, stream


@given(st.integers(0, 2**56 - 1), st.sampled_from(Purpose), st.lists(st.integers(0, 2**63), min_size=1, max_size=5))
@example(seed=2**55, purpose=Purpose.CROP, positions=[2**53 + 1])
def test_one_generator_at_many_positions_draws_what_new_ones_draw(
    seed: int, purpose: Purpose, positions: list[int]
) -> None:
    many = Streams(seed, purpose)
    for position in positions:
        reused, fresh = many.at(position), stream(seed, purpose, position)
        for draw in ("random", "permutation", "uint32", "float32"):  # the last two leave half a word behind
            a, b = (
                {
                    "random": lambda g=g: g.random(3),
                    "permutation": lambda g=g: g.permutation(9),
                    "uint32": lambda g=g: g.integers(2**31, size=3, dtype=np.uint32),
                    "float32": lambda g=g: g.random(5, dtype=np.float32),
                }[draw]()
                for g in (reused, fresh)
            )
            assert np.array_equal(a, b)


@pytest.mark.parametrize("seed", [2**55, 2**56 - 1])
def test_neighbouring_positions_of_great_seeds_differ(seed: int) -> None:
    """If a key were made of a list with such a number, it would be rounded to 53 bits."""
    draws = [stream(seed + ds, Purpose.CROP, 2**53 + dp).integers(2**63) for ds, dp in ((0, 0), (0, 1), (-1, 0))]
    assert len(set(draws)) == 3
