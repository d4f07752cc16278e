"""Fetch remote shards before their samples are needed, because the order is known in advance."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

from mpp.data.order import Order
from mpp.data.shards.reader import ShardImages
from mpp.data.shards.remote import FAULTS
from mpp.errors import UserError


class Ahead:
    """Keeps the shards of the order's current windows in the cache, and fetches those of the next windows in a thread.

    Every process that reads has one. It skips shards that another process is fetching, so that several shards are
    fetched at the same time.

    Args:
        images: Indexed shards.
        order: Order of the samples.
        lanes: Lanes that are read on this machine.

    Raises:
        UserError: If the cache cannot hold one window of each lane.
    """

    def __init__(self, images: ShardImages, order: Order, lanes: Sequence[int]) -> None:
        self.images, self.order, self.lanes = images, order, lanes
        self._window: tuple[int, int] | None = None
        sizes = images.remote(range(len(images.names)))
        self._busy = bool(sizes)
        if sum(sizes.values()) <= images.store.limit_bytes:
            return
        window, most = (0, 0), (0, (0, 0))
        while window[0] == 0:
            most = max(most, (sum(self._shards(window).values()), window))
            window = order.window_after(*window)
        images.require(
            self._shards(most[1]),
            f"{len(lanes)} lanes with windows of {order.window} samples take",
            "; or lower data.lanes or data.window",
        )

    def come_to(self, position: int) -> None:
        """Fetch the shards around the sample at `position`, which is read next or soon."""
        window = self.order.window_at(position)
        if self._busy and window != self._window:
            self._window = window
            threading.Thread(target=self._fetch, args=(window,), daemon=True).start()

    def _shards(self, window: tuple[int, int]) -> dict[int, int]:
        return self.images.remote(self.order.shards_in(*window, self.lanes))

    def _fetch(self, window: tuple[int, int]) -> None:
        now, after = self._shards(window), self._shards(self.order.window_after(*window))
        room = self.images.store.limit_bytes
        for shard, size in {**now, **after}.items():  # the current ones are marked as used, so others are deleted first
            room -= size
            if room < 0 or self._window != window:
                return
            with contextlib.suppress(UserError, *FAULTS):  # the process that needs the shard reports the fault
                self.images.store.fetch(self.images.names[shard], wait=False)
