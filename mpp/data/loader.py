"""Batches of pretraining: read, crop, flip, mask. All of it a pure function of (seed, position)."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mpp.data.ahead import Ahead
from mpp.data.arrays import ValueRange
from mpp.data.children import end_with
from mpp.data.decode import GREY, centre_box, decode_crop, random_box
from mpp.data.images import ShardImages
from mpp.errors import UserError
from mpp.rng import Purpose, Streams, stream
from mpp.types import NOISE, Batch, MaskSampler, Units


@dataclass
class Crop:
    """How an image becomes a training sample."""

    size: tuple[int, int]
    """(H, W) in pixels"""
    channels: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    formats: tuple[str, ...]
    max_image_pixels: int
    value_range: ValueRange | None = None
    """Of images that are not read as 8 bit."""
    nodata: float | None = None
    """The value of missing pixels in them."""

    def random(self, data: bytes, rng: np.random.Generator) -> Tensor:
        """(C, H, W): crop and flip of the sample that this generator belongs to."""
        flip = rng.random() < self.flip  # drawn first: the crop takes a varying number of draws
        image = self._decode(data, lambda w, h: random_box(rng, w, h, self.scale, self.ratio))
        return image.flip(-1) if flip else image

    def centre(self, data: bytes) -> Tensor:
        """(C, H, W) uint8: the largest centred crop."""
        return self._decode(data, lambda w, h: centre_box(w, h, self.size))

    def _decode(self, data: bytes, choose_box: Any) -> Tensor:
        return decode_crop(
            data,
            choose_box,
            self.size,
            channels=self.channels,
            formats=self.formats,
            max_image_pixels=self.max_image_pixels,
            value_range=self.value_range,
            nodata=self.nodata,
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.value_range is None else torch.float32


def draw_masks(sampler: MaskSampler, grid: tuple[int, int], draw: float, seed: int, positions: Sequence[int]) -> Units:
    """The masks and noise of the samples at these positions; `draw` as in `MaskSampler.count`."""
    count = sampler.count(grid, draw)
    masks, noises = Streams(seed, Purpose.MASK), Streams(seed, Purpose.NOISE)
    hidden = np.stack([sampler(grid, count, masks.at(p)) for p in positions])
    if (hidden.sum((1, 2)) != count).any():
        found = sorted({int(n) for n in hidden.sum((1, 2))})
        raise UserError(
            f"mask: {type(sampler).__name__} says it hides {count} units of {grid[0]}×{grid[1]}, and hides "
            f"{' or '.join(map(str, found))}; it must hide as many in every image"
        )
    size = (len(NOISE), *grid)
    noise = np.stack([noises.at(p).random(size, dtype=np.float32) for p in positions])
    return Units(torch.from_numpy(hidden), count, torch.from_numpy(noise))


class PretrainDataset(Dataset[Batch]):
    """Keys are (position, shard, row); a list of keys makes a `Batch`.

    train_counts: rows of each shard that are trained on; those after are held out. A bad image is replaced by
    one of its own kind. global_batch: samples of one step, which all hide as many units. ahead: fetches remote shards.
    """

    def __init__(
        self,
        images: ShardImages,
        crop: Crop,
        mask: MaskSampler,
        mask_grid: tuple[int, int],
        seed: int,
        train_counts: Sequence[int] | np.ndarray,
        global_batch: int,
        ahead: Ahead | None = None,
    ) -> None:
        self.images, self.crop, self.mask, self.mask_grid, self.seed = images, crop, mask, mask_grid, seed
        self.train_counts, self.global_batch, self.ahead = train_counts, global_batch, ahead

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> Batch | UserError:
        try:
            if self.ahead:
                self.ahead.come_to(keys[0][0])
            return self.batch(keys)
        except UserError as error:
            return error  # raised by `batches`, without the worker's traceback

    def batch(self, keys: list[tuple[int, int, int]], *, centre: bool = False) -> Batch:
        """centre: for held-out images: no randomness in the crop, the middle of a range of mask ratios."""
        size = (self.crop.channels, *self.crop.size)
        images = torch.empty((len(keys), *size), dtype=self.crop.dtype)
        grey = torch.full(size, GREY, dtype=torch.uint8)
        step = keys[0][0] // self.global_batch
        draw = 0.5 if centre else stream(self.seed, Purpose.RATIO, step).random()
        masks = draw_masks(self.mask, self.mask_grid, draw, self.seed, [position for position, _, _ in keys])
        bad: list[str] = []
        replaced, crops = 0, Streams(self.seed, Purpose.CROP)
        for i, (position, shard, row) in enumerate(keys):

            def crop(data: bytes, position: int = position) -> Tensor:
                return self.crop.centre(data) if centre else self.crop.random(data, crops.at(position))

            last = int(self.train_counts[shard])
            rows = range(last) if row < last else range(last, self.images.counts[shard])
            images[i], passed_over = self.images.load(shard, row, rows, crop, blank=grey, few=centre)
            bad += passed_over
            replaced += bool(passed_over)
        return Batch(
            images,
            masks.hidden,
            masks.noise,
            torch.tensor([k[0] for k in keys]),
            torch.tensor([k[1:] for k in keys]),
            masks.count,
            replaced,
            bad,
        )


QUIET_S = 0.05
"""Before workers are forked. Just after an exchange threads of gloo's enter Python, and a CPython (3.11) that is forked
then may leave the child waiting for ever for a lock that such a thread had: 3 of some 20,000 forks."""


def _as_it_is(batch: Any) -> Any:
    return batch


def _serve_the_parent_alone(worker: int) -> None:
    """A scheduler may signal every process of a job; the loop still needs batches to finish its step.

    Workers end when the loop closes the loader, or with its process.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with(os.getppid())
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            shown(kind, error, trace)

    # multiprocessing shows here that a parent ended while a batch was handed over; the parent has said why
    sys.excepthook = hook


def batches(
    dataset: Dataset[Any], sampler: Iterable[list[tuple[int, int, int]]], *, workers: int, pin_memory: bool
) -> Iterator[Any]:
    """What `dataset.__getitems__` makes of the sampler's lists, in their order, `workers` processes ahead.

    UserError where a worker met one, or died.
    """
    # more workers than cores may be wanted where they wait for a disk; `mpp doctor` and data_wait are there to look at
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_serve_the_parent_alone,
    )
    if workers and dist.is_available() and dist.is_initialized():
        time.sleep(QUIET_S)
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (RuntimeError, EOFError, OSError) as error:
        if not workers or (isinstance(error, RuntimeError) and not of_a_worker(error)):
            raise
        if isinstance(error, RuntimeError):
            raise worker_died(error) from error
        try:
            time.sleep(1)  # it died while it handed over a batch; the system says so a little later
        except RuntimeError as told:
            raise worker_died(told) from error
        raise worker_died(error) from error


def of_a_worker(error: BaseException) -> bool:
    """Whether it is torch's word that a worker died: raised wherever the main thread is at that moment."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def worker_died(error: BaseException) -> UserError:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"data.workers: {said} Out of memory? Go on with --resume auto")


@atexit.register
def _kill_workers() -> None:
    """Workers ignore the SIGTERM with which multiprocessing ends them when an error ends their parent."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises
    for child in workers:
        child.kill()
