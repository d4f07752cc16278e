"""How a global batch is divided among processes and micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpp.errors import UserError
from mpp.training.exchange import accumulation


@given(images=st.integers(1, 60), world=st.integers(1, 4), views=st.integers(1, 4), most=st.integers(1, 40))
def test_micro_batches_are_equal_fit_and_keep_views_together(images: int, world: int, views: int, most: int) -> None:
    """The fewest micro-batches that fit are chosen."""
    least = 2 * views if views > 1 else 1
    possible = [n for n in range(1, images + 1) if images % n == 0 and least <= images // n * views <= most]
    global_batch = images * world * views
    if possible:
        assert accumulation(global_batch, world, most, views) == possible[0]
    else:
        with pytest.raises(UserError, match=f"cannot be divided into equal micro-batches .* at most {most} "):
            accumulation(global_batch, world, most, views)


def test_a_batch_that_the_processes_cannot_share() -> None:
    with pytest.raises(UserError, match="15 cannot be divided among 2 processes; expected a multiple of 2"):
        accumulation(15, 2, 9)
