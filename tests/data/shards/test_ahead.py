"""Remote shards are fetched before their samples are needed, and never more than the cache can hold."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpp.data.order import Order
from mpp.data.shards.ahead import Ahead
from mpp.data.shards.reader import ShardImages
from mpp.errors import UserError
from tests.data.test_loader import shard_of
from tests.http_server import Served, serve

SHARDS, IMAGES = 8, 10


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "served").mkdir()
    for i in range(SHARDS):
        shard = shard_of(tmp_path / "served" / f"s{i}.tar", [bytes([i + 1]) * 600 for _ in range(IMAGES)])
        ShardImages(str(shard), key="k")  # writes its index
    found, server = serve(tmp_path / "served")
    yield found
    server.shutdown()


def reader(served: Served, cache: Path, shards: float) -> tuple[ShardImages, Order, Ahead]:
    size = (served.folder / "s0.tar").stat().st_size
    spec = f"{served.url}/s{{0..{SHARDS - 1}}}.tar"
    images = ShardImages(spec, key="k", cache_dir=str(cache), cache_limit_bytes=shards * size)
    order = Order(images.counts, global_batch=4, seed=3, lanes=1, window=IMAGES)
    return images, order, Ahead(images, order, [0])


def require_existing(images: ShardImages) -> set[int]:
    return {i for i, name in enumerate(images.names) if images.store.target(name).exists()}


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_next_window_comes_while_this_one_is_read(served: Served, tmp_path: Path) -> None:
    images, order, ahead = reader(served, tmp_path / "cache", shards=4.5)
    assert require_existing(images) == set()
    windows = [order.window_at(0)]
    while len(windows) < 16:  # two epochs
        windows.append(order.window_after(*windows[-1]))
    for now, after in zip(windows, windows[1:], strict=False):
        seen = next(n for n in range(10_000) if order.window_at(n) == now)
        ahead.come_to(seen)
        wanted = {*order.shards_in(*now, [0]), *order.shards_in(*after, [0])}
        until(lambda wanted=wanted: wanted <= require_existing(images))
    assert served.whole() > SHARDS, "a cache for four shards must fetch some of them twice"


def test_what_is_needed_now_is_not_pushed_out_by_what_comes_next(served: Served, tmp_path: Path) -> None:
    images, order, ahead = reader(served, tmp_path / "cache", shards=2.5)
    for seen in range(0, 60, 4):
        ahead.come_to(seen)
        now = set(order.shards_in(*order.window_at(seen), [0]))
        until(lambda now=now: now <= require_existing(images))
        time.sleep(0.03)
        assert now <= require_existing(images)


def test_what_another_process_fetches_is_left_to_it(served: Served, tmp_path: Path) -> None:
    images, order, ahead = reader(served, tmp_path / "cache", shards=4.5)
    now = order.window_at(0)
    first, *others = dict.fromkeys([*order.shards_in(*now, [0]), *order.shards_in(*order.window_after(*now), [0])])
    target = images.store.target(images.names[first])
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ahead.come_to(0)
        until(lambda: set(others) <= require_existing(images))
        assert first not in require_existing(images)


def test_a_window_that_is_over_is_fetched_no_further(served: Served, tmp_path: Path) -> None:
    images, order, ahead = reader(served, tmp_path / "cache", shards=7.5)
    windows = [order.window_at(0)]
    while len(windows) < 5:
        windows.append(order.window_after(*windows[-1]))
    in_window = [set(order.shards_in(*w, [0])) for w in windows]
    old, new = in_window[0] | in_window[1], in_window[3] | in_window[4]
    first, *_ = order.shards_in(*windows[0], [0])
    assert old - new - {first}
    served.bytes_per_s = 2 * (served.folder / "s0.tar").stat().st_size  # half a second each
    ahead.come_to(0)
    until(lambda: len(served.log) > SHARDS)  # the first shard is being fetched, after all indexes
    ahead.come_to(next(n for n in range(10_000) if order.window_at(n) == windows[3]))
    until(lambda: new <= require_existing(images))
    time.sleep(1)
    assert require_existing(images) - new <= {first}, "only the shard that was being fetched may arrive"


def test_local_shards_need_nothing(served: Served, tmp_path: Path) -> None:
    images = ShardImages(str(served.folder), key="k", cache_dir=str(tmp_path / "cache"), cache_limit_bytes=1)
    Ahead(images, Order(images.counts, global_batch=4, seed=3), [0]).come_to(0)
    assert not (tmp_path / "cache" / "shards").exists()


def test_a_cache_for_less_than_a_window_is_refused(served: Served, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"cache_limit_gb: 1 lanes with windows of 10 samples take .*; or lower data\.l"
    ):
        reader(served, tmp_path / "cache", shards=1.5)


def test_what_cannot_be_fetched_is_left_to_who_reads_it(served: Served, tmp_path: Path) -> None:
    images, order, ahead = reader(served, tmp_path / "cache", shards=4.5)
    first, *_ = order.shards_in(*order.window_at(0), [0])
    (served.folder / f"s{first}.tar").unlink()
    ahead.come_to(0)
    until(lambda: len(require_existing(images)) >= 2)
    with pytest.raises(UserError, match="404"):
        images.read(first, 0)
