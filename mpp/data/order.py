"""The order in which a run sees its samples: a pure function of (seed, position).

A sample is one crop of an image. If an image has several views, they are consecutive samples.

In each epoch the shards are permuted, concatenated and cut into `lanes` equal parts. Each lane is shuffled in windows
of `window` samples. A global batch takes batch / lanes samples from every lane. So it mixes shards from the first step,
while reading stays nearly sequential. The number of samples seen is the only state, so a run can stop anywhere and
continue with any number of processes and workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np

from mpp.rng import Purpose, stream


class Order:
    """Samples of an endless run over shards. No image occurs twice in an epoch, except for its views.

    Fewer than `lanes` images are left out of each epoch, different ones each time.

    Args:
        counts: Number of images of each shard.
        global_batch: Number of samples of a step, a multiple of `views`.
        seed: Seed of the run.
        lanes: Greatest number of lanes. The largest divisor of the images of a step is used that exceeds neither this
            number nor the images divided by `window`, rounded up. So small datasets are shuffled as a whole.
        window: Number of consecutive images of a lane that are shuffled together.
        views: Number of consecutive samples that are views of one image.

    Raises:
        ValueError: If there are no images.
    """

    def __init__(
        self,
        counts: list[int] | np.ndarray,
        *,
        global_batch: int,
        seed: int,
        lanes: int = 256,
        window: int = 4096,
        views: int = 1,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        total = int(self.counts.sum())
        if total == 0:
            raise ValueError("no samples")
        images_per_step = global_batch // views
        most = min(lanes, math.ceil(total / window), images_per_step)
        self.lanes = max(n for n in range(1, most + 1) if images_per_step % n == 0)
        self.lane_len = total // self.lanes
        self.epoch_len = self.lane_len * self.lanes * views
        """Number of samples of an epoch."""
        self.samples_per_lane = global_batch // self.lanes
        """Number of samples of a step from each lane."""
        self.global_batch, self.window, self.seed, self.views = global_batch, window, seed, views
        self.total = total
        self._remember()

    def _remember(self) -> None:
        """Set up the caches of the latest permutations."""
        self._shards = lru_cache(2)(self._make_shards)
        self._window = lru_cache(4 * self.lanes)(self._make_window)

    def __getstate__(self) -> dict[str, object]:  # for workers that are spawned
        return {key: value for key, value in self.__dict__.items() if key not in ("_shards", "_window")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._remember()

    def _make_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the permuted shards of an epoch, the start of each, and the sample at which the first lane begins."""
        rng = stream(self.seed, Purpose.SHARDS, epoch)
        permuted = rng.permutation(len(self.counts))
        return permuted, np.concatenate([[0], np.cumsum(self.counts[permuted])]), int(rng.integers(self.total))

    def _make_window(self, epoch: int, lane: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards and the rows of one window of one lane, shuffled."""
        low = number * self.window
        high = min(low + self.window, self.lane_len)
        windows_per_lane = math.ceil(self.lane_len / self.window)
        key = (epoch * self.lanes + lane) * windows_per_lane + number
        places = lane * self.lane_len + low + stream(self.seed, Purpose.WINDOW, key).permutation(high - low)
        permuted, starts, first = self._shards(epoch)
        places = (places + first) % self.total  # varied, or a single shard's last samples would never be seen
        k = np.searchsorted(starts, places, side="right") - 1
        return permuted[k], places - starts[k]

    def window_at(self, seen: int) -> tuple[int, int]:
        """Return (epoch, number) of the window in which every lane is after `seen` samples."""
        epoch, offset = divmod(seen // self.views // self.lanes, self.lane_len)
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
            for a, b in ((begin, min(end, self.total)), (0, end - self.total)):  # it may wrap around
                if b > a:
                    inside = slice(np.searchsorted(starts, a, "right") - 1, np.searchsorted(starts, b, "left"))
                    touched.update(range(len(permuted))[inside])
        return [int(permuted[k]) for k in sorted(touched) if self.counts[permuted[k]]]

    def at(self, seen: int, start: int, count: int) -> list[tuple[int, int, int]]:
        """Return (position, shard, row) of some samples of a global batch.

        Args:
            seen: Number of samples before this global batch.
            start: First slot of the global batch to return.
            count: Number of samples to return.
        """
        taken = seen // self.views // self.lanes  # images of each lane
        samples = []
        for slot in range(start, start + count):
            lane, j = divmod(slot, self.samples_per_lane)
            epoch, offset = divmod(taken + j // self.views, self.lane_len)
            number, place = divmod(offset, self.window)
            shards, rows = self._window(epoch, lane, number)
            samples.append((seen + slot, int(shards[place]), int(rows[place])))
        return samples


def lanes_read_by(ranks: Iterable[int], order: Order, *, accumulate: int, world: int) -> list[int]:
    """Return the lanes from which these ranks take samples, out of `world` processes."""
    size = order.global_batch // (accumulate * world)
    starts = [(m * world + rank) * size for rank in ranks for m in range(accumulate)]
    return sorted({slot // order.samples_per_lane for start in starts for slot in range(start, start + size)})


class MicroBatches:
    """Batch sampler of one process: the micro-batches of `steps` steps after `seen` samples.

    A global batch is cut into accumulate · world micro-batches of equal size. This process takes every world-th one.
    Each iteration starts at `seen` again.
    """

    def __init__(self, order: Order, *, seen: int, steps: int, accumulate: int, rank: int = 0, world: int = 1) -> None:
        self.order, self.seen, self.steps, self.accumulate = order, seen, steps, accumulate
        self.rank, self.world = rank, world
        self.size = order.global_batch // (accumulate * world)

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def keys(self, seen: int) -> list[list[tuple[int, int, int]]]:
        """Return this process's micro-batches of the step after `seen` samples, as lists of (position, shard, row)."""
        starts = [(m * self.world + self.rank) * self.size for m in range(self.accumulate)]
        return [self.order.at(seen, start, self.size) for start in starts]

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in range(self.steps):
            yield from self.keys(self.seen + step * self.order.global_batch)
