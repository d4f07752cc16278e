"""The order of samples is a pure function of (seed, position). Each sample occurs at most once per epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpp.data.order import MicroBatches, Order, lanes_read_by


def run(order: Order, seen: int, steps: int, world: int = 1, accumulate: int = 1) -> list[list[tuple[int, int, int]]]:
    """Return the samples of each step in slot order, for any number of processes."""
    parts = [
        list(MicroBatches(order, seen=seen, steps=steps, accumulate=accumulate, rank=r, world=world))
        for r in range(world)
    ]
    return [
        sorted(s for part in parts for m in range(accumulate) for s in part[step * accumulate + m])
        for step in range(steps)
    ]


counts_of = st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(lambda c: sum(c) > 0)


@settings(max_examples=60, deadline=None)
@given(
    counts=counts_of,
    batch=st.sampled_from([4, 6, 16, 24]),
    seed=st.integers(0, 2**50),
    window=st.integers(1, 80),
)
def test_a_sample_comes_at_most_once_an_epoch(counts: list[int], batch: int, seed: int, window: int) -> None:
    order = Order(counts, global_batch=batch, seed=seed, lanes=8, window=window)
    assert sum(counts) - order.epoch_len < order.lanes
    per_lane_epoch: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for step in run(order, 0, 3 * order.epoch_len // batch + 1):
        for slot, (position, shard, row) in enumerate(step):
            assert 0 <= row < counts[shard]
            lane, j = divmod(slot, batch // order.lanes)
            epoch = ((position - slot) // order.lanes + j) // order.lane_len
            per_lane_epoch.setdefault((epoch, 0), []).append((shard, row))
            assert lane < order.lanes
    for samples in per_lane_epoch.values():
        assert len(set(samples)) == len(samples)


@settings(max_examples=30, deadline=None)
@given(counts=counts_of, seed=st.integers(0, 99), cut=st.integers(0, 7))
def test_a_run_cut_anywhere_goes_on_the_same_with_other_processes(counts: list[int], seed: int, cut: int) -> None:
    order = Order(counts, global_batch=12, seed=seed, lanes=4, window=16)
    whole = run(order, 0, 9)
    again = Order(counts, global_batch=12, seed=seed, lanes=4, window=16)
    for world, accumulate in ((1, 1), (2, 1), (3, 2), (1, 4), (6, 2)):
        assert run(again, cut * 12, 9 - cut, world, accumulate) == whole[cut:]


@settings(max_examples=30, deadline=None)
@given(counts=counts_of, views=st.integers(2, 4), seed=st.integers(0, 99), steps_before=st.integers(0, 30))
def test_views_of_an_image_are_consecutive_samples(counts: list[int], views: int, seed: int, steps_before: int) -> None:
    """The images come in the order that they have with one view."""
    once = Order(counts, global_batch=6, seed=seed, lanes=3, window=8)
    several = Order(counts, global_batch=6 * views, seed=seed, lanes=3, window=8, views=views)
    assert several.epoch_len == views * once.epoch_len
    seen = 6 * steps_before
    samples = several.at(seen * views, 0, 6 * views)
    assert [position for position, _, _ in samples] == list(range(seen * views, (seen + 6) * views))
    images = [image for _, *image in once.at(seen, 0, 6)]
    assert [image for _, *image in samples] == [image for image in images for _ in range(views)]
    assert several.window_at(seen * views) == once.window_at(seen)
    half = [lanes_read_by([1], order, accumulate=1, world=2) for order in (once, several)]
    assert half[0] == half[1]


def test_seeds_and_epochs_differ() -> None:
    orders = [Order([40, 40], global_batch=8, seed=s) for s in (0, 1)]
    first = [[s[1:] for step in run(o, 0, 10) for s in step] for o in orders]
    second = [s[1:] for step in run(orders[0], 80, 10) for s in step]
    assert first[0] != first[1]
    assert first[0] != second
    assert sorted(first[0]) == sorted(second), "every epoch must have the same samples"


def test_a_batch_mixes_shards_even_where_these_are_sorted_by_class() -> None:
    order = Order([1000] * 100, global_batch=256, seed=0, lanes=256, window=256)
    shards = {shard for _, shard, _ in order.at(0, 0, 256)}
    assert order.lanes == 256
    assert len(shards) > 60


def test_a_billion_samples_start_and_resume_at_once() -> None:
    order = Order(np.full(100_000, 10_000), global_batch=4096, seed=0)
    assert len(order.at(0, 64, 64)) == 64
    assert order.at(4096 * 10**6, 0, 64)[0][0] == 4096 * 10**6


def test_no_sample_is_left_out_of_every_epoch() -> None:
    order = Order([11], global_batch=4, seed=0, lanes=4, window=3)
    assert order.epoch_len == 8
    assert {row for step in run(order, 0, 100) for _, _, row in step} == set(range(11))


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Order([0, 0], global_batch=4, seed=0)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum),
    global_batch=st.integers(1, 16),
    lanes=st.integers(1, 8),
    window=st.integers(1, 20),
    seed=st.integers(0, 5),
    seen_batches=st.integers(0, 40),
)
def test_the_shards_of_a_window_are_those_that_are_read(
    counts: list[int], global_batch: int, lanes: int, window: int, seed: int, seen_batches: int
) -> None:
    order = Order(counts, global_batch=global_batch, seed=seed, lanes=lanes, window=window)
    read: dict[tuple[int, int, int], set[int]] = {}
    for epoch in range(2):
        for lane in range(order.lanes):
            for number in range(-(-order.lane_len // window)):
                read[epoch, number, lane] = set(order._window(epoch, lane, number)[0].tolist())
    for (epoch, number, lane), shards in read.items():
        assert set(order.shards_in(epoch, number, [lane])) == shards
    windows = sorted({(epoch, number) for epoch, number, _ in read})
    for now, after in zip(windows, windows[1:], strict=False):
        assert order.window_after(*now) == after
        everything = order.shards_in(*now, range(order.lanes))
        assert len(everything) == len(set(everything))
    # a sample's shard is in the window of its position, or in the next one if the batch spans both
    seen = seen_batches * global_batch
    near = [order.window_at(seen), order.window_after(*order.window_at(seen))]
    assert order.window_at(seen + order.epoch_len) == (near[0][0] + 1, near[0][1])
    if global_batch // order.lanes <= min(window, order.lane_len % window or window):
        allowed = {s for w in near for s in order.shards_in(*w, range(order.lanes))}
        assert {s for _, s, _ in order.at(seen, 0, global_batch)} <= allowed


@given(st.sampled_from([(12, 1, 1), (12, 2, 1), (12, 3, 2), (16, 4, 2), (12, 1, 3)]), st.integers(1, 6))
def test_the_lanes_of_some_processes_are_those_that_they_read(layout: tuple[int, int, int], lanes: int) -> None:
    global_batch, world, accumulate = layout
    order = Order([50, 50], global_batch=global_batch, seed=0, lanes=lanes, window=5)
    per_lane = global_batch // order.lanes
    for ranks in ([0], [world - 1], list(range(world))):
        slots = {
            position % global_batch
            for rank in ranks
            for keys in MicroBatches(order, seen=0, steps=1, accumulate=accumulate, rank=rank, world=world)
            for position, _, _ in keys
        }
        assert lanes_read_by(ranks, order, accumulate=accumulate, world=world) == sorted({s // per_lane for s in slots})
