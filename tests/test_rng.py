"""Randomness as a function of (seed, purpose, position)."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mpp.rng import Purpose, Streams, stream


@given(st.integers(0, 2**56 - 1), st.sampled_from(Purpose), st.lists(st.integers(0, 2**63), min_size=1, max_size=5))
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
