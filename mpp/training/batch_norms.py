"""Batch norms of a model that has learned: statistics of images as it will judge them.

While a model learns, its batch norms follow a moving average of what they see: images that are hidden in part, mixed or
erased, through weights that change. Averaged weights saw none of that. With the statistics of training, fine-tuned
classifiers were 3 points worse, averaged weights in the middle of training 8 (recipes/LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpp.data.shards.reader import evenly

MEASURED_ON = 1024
"""Images that statistics are measured on, if there are so many. 1,000 to 10,000 are enough (Wu & Johnson 2021,
"Rethinking 'Batch' in BatchNorm", section 3)."""
LEAST_IMAGES = 24
"""With fewer images the statistics stay as they are (a guess). A channel that is nearly constant over a few images
gets a variance near zero, and dividing by it multiplies rounding errors: an EfficientNet measured on 12 images failed
the verification of its export."""
AT_ONCE = 64
"""Images whose statistics are taken together, at most (a guess; 256 gave the same accuracy)."""


def batch_norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a model that have statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def use_batch_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let batch norms that are in eval mode normalise by the statistics of each batch, and keep their own."""
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True


@contextmanager
def restore_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Give batch norms back the statistics that they have now."""
    before = [_copy_statistics(norm) for norm in norms]
    try:
        yield
    finally:
        for norm, statistics in zip(norms, before, strict=True):
            _put_back(norm, statistics)


@torch.no_grad()
def measure_batch_norms(model: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Tensor]) -> None:
    """Replace the statistics of batch norms by their mean over some batches.

    Everything else of the model runs in eval mode, in which it is left. A batch norm that no image reaches keeps its
    statistics: a model that is asked for maps of features may end before its last ones.

    Args:
        model: Whose they are.
        norms: The batch norms. The statistics of all others stay.
        batches: Of what the model takes, (B, C, H, W) normalised, B > 1. If there is none, the statistics stay.
    """
    model.eval()
    if not norms:
        return
    before = [(norm.momentum, _copy_statistics(norm)) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
        norm.training = True
    try:
        for images in batches:
            model(images)
    finally:
        for norm, (momentum, statistics) in zip(norms, before, strict=True):
            norm.momentum, norm.training = momentum, False
            if norm.num_batches_tracked == 0:
                _put_back(norm, statistics)


def _copy_statistics(norm: _BatchNorm) -> list[Tensor]:
    return [value.clone() for value in norm.buffers(recurse=False)]


def _put_back(norm: _BatchNorm, statistics: list[Tensor]) -> None:
    for value, before in zip(norm.buffers(recurse=False), statistics, strict=True):
        value.copy_(before)


def choose_batches(numbers: Sequence[int], most: int = AT_ONCE) -> list[list[int]]:
    """Choose numbers of images to measure on, in batches of nearly the same size.

    Args:
        numbers: Of all images.
        most: Images of a batch; if it is less than 3, batches have 2 or 3.

    Returns:
        At most `MEASURED_ON` of the numbers, in an order that is always the same and has nothing to do with theirs:
        neighbours often have the same class. Nothing if there are fewer than `LEAST_IMAGES`.
    """
    chosen = [numbers[i] for i in evenly(len(numbers), MEASURED_ON)]
    if len(chosen) < LEAST_IMAGES:
        return []
    shuffled = np.random.default_rng(0).permutation(np.asarray(chosen))
    count = min(-(-len(chosen) // most), len(chosen) // 2)  # no batch has one image alone
    return [part.tolist() for part in np.array_split(shuffled, count)]
