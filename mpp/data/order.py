"""The order in which a run sees its samples: a pure function of (seed, position).

In each epoch the shards are permuted and laid end to end, cut into `lanes` equal runs, and each lane is
shuffled in windows of `window` samples. A global batch takes batch / lanes samples from every lane, so it
mixes shards from the first step on while reading stays nearly sequential. Nothing is remembered but the
number of samples seen: a run can stop anywhere and continue with any number of processes and workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np

from mpp.rng import Purpose, stream


class Order:
    """Samples of an endless run over shards. No sample comes twice in an epoch.

    Fewer than `lanes` samples are left out of an epoch, others each time.

    Args:
        counts: Samples of each shard.
        global_batch: Samples of a step.
        seed: Of the run.
        lanes: At most so many; the largest divisor of `global_batch` is used that keeps lanes no shorter than a window,
            so that small data sets are shuffled whole.
        window: Samples of a lane that are shuffled among themselves.

    Raises:
        ValueError: There are no samples.
    """

    def __init__(
        self,
        counts: list[int] | np.ndarray,
        *,
        global_batch: int,
        seed: int,
        lanes: int = 256,
        window: int = 4096,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        total = int(self.counts.sum())
        if total == 0:
            raise ValueError("no samples")
        most = min(lanes, math.ceil(total / window), global_batch)
        self.lanes = max(n for n in range(1, most + 1) if global_batch % n == 0)
        self.lane_len = total // self.lanes
        self.epoch_len = self.lane_len * self.lanes
        self.global_batch, self.window, self.seed = global_batch, window, seed
        self.total = total
        self._remember()

    def _remember(self) -> None:
        """Keep what was permuted last."""
        self._shards = lru_cache(2)(self._make_shards)
        self._window = lru_cache(4 * self.lanes)(self._make_window)

    def __getstate__(self) -> dict[str, object]:  # for workers that are spawned
        return {key: value for key, value in self.__dict__.items() if key not in ("_shards", "_window")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._remember()

    def _make_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The permuted shards of an epoch, where each starts, and at which sample the first lane begins."""
        rng = stream(self.seed, Purpose.SHARDS, epoch)
        permuted = rng.permutation(len(self.counts))
        return permuted, np.concatenate([[0], np.cumsum(self.counts[permuted])]), int(rng.integers(self.total))

    def _make_window(self, epoch: int, lane: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffled (shard, row) of one window of one lane."""
        low = number * self.window
        high = min(low + self.window, self.lane_len)
        windows_per_lane = math.ceil(self.lane_len / self.window)
        key = (epoch * self.lanes + lane) * windows_per_lane + number
        places = lane * self.lane_len + low + stream(self.seed, Purpose.WINDOW, key).permutation(high - low)
        permuted, starts, first = self._shards(epoch)
        places = (places + first) % self.total  # else one shard's last samples would be left out of every epoch
        k = np.searchsorted(starts, places, side="right") - 1
        return permuted[k], places - starts[k]

    def window_at(self, seen: int) -> tuple[int, int]:
        """(epoch, number) of the window that every lane is in after `seen` samples."""
        epoch, offset = divmod(seen // self.lanes, self.lane_len)
        return epoch, offset // self.window

    def window_after(self, epoch: int, number: int) -> tuple[int, int]:
        return (epoch, number + 1) if (number + 1) * self.window < self.lane_len else (epoch + 1, 0)

    def shards_in(self, epoch: int, number: int, lanes: Iterable[int]) -> list[int]:
        """Return the shards that hold samples of a window of these lanes, in the order of the epoch."""
        permuted, starts, first = self._shards(epoch)
        low, high = number * self.window, min((number + 1) * self.window, self.lane_len)
        touched: set[int] = set()
        for lane in lanes:
            begin = (lane * self.lane_len + low + first) % self.total
            end = begin + high - low
            for a, b in ((begin, min(end, self.total)), (0, end - self.total)):  # it may go on from the start
                if b > a:
                    inside = slice(np.searchsorted(starts, a, "right") - 1, np.searchsorted(starts, b, "left"))
                    touched.update(range(len(permuted))[inside])
        return [int(permuted[k]) for k in sorted(touched) if self.counts[permuted[k]]]

    def at(self, seen: int, start: int, count: int) -> list[tuple[int, int, int]]:
        """Return (position, shard, row) of some samples of a global batch.

        Args:
            seen: Samples before this global batch.
            start: The first slot of the batch that is wanted.
            count: How many are wanted.
        """
        per_lane = self.global_batch // self.lanes
        taken = seen // self.lanes
        samples = []
        for slot in range(start, start + count):
            lane, j = divmod(slot, per_lane)
            epoch, offset = divmod(taken + j, self.lane_len)
            number, place = divmod(offset, self.window)
            shards, rows = self._window(epoch, lane, number)
            samples.append((seen + slot, int(shards[place]), int(rows[place])))
        return samples


def lanes_read_by(ranks: Iterable[int], order: Order, *, accumulate: int, world: int) -> list[int]:
    """The lanes from which these processes of `world` take samples."""
    size, per_lane = order.global_batch // (accumulate * world), order.global_batch // order.lanes
    starts = [(m * world + rank) * size for rank in ranks for m in range(accumulate)]
    return sorted({slot // per_lane for start in starts for slot in range(start, start + size)})


class MicroBatches:
    """Batch sampler of one process: the micro-batches of steps that begin at `seen`, until `total_steps` are done.

    A global batch is cut into accumulate · world micro-batches of equal size; this process takes every
    world-th. Iterating again starts again at `seen`.
    """

    def __init__(self, order: Order, *, seen: int, steps: int, accumulate: int, rank: int = 0, world: int = 1) -> None:
        self.order, self.seen, self.steps, self.accumulate = order, seen, steps, accumulate
        self.rank, self.world = rank, world
        self.size = order.global_batch // (accumulate * world)

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def keys(self, seen: int) -> list[list[tuple[int, int, int]]]:
        """(position, shard, row) of this process's micro-batches of the step that follows `seen` samples."""
        starts = [(m * self.world + self.rank) * self.size for m in range(self.accumulate)]
        return [self.order.at(seen, start, self.size) for start in starts]

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in range(self.steps):
            yield from self.keys(self.seen + step * self.order.global_batch)
