"""Measure the statistics of batch norms after training, on images as the model will get them.

During training, the statistics of batch norms are moving averages over images that are partly hidden, mixed or erased,
with weights that change. Averaged weights did not process these images at all. With the statistics of training,
fine-tuned classifiers were 3 points worse, and averaged weights in the middle of training 8 points (recipes/LOG.md).
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
"""Most images on which statistics are measured. 1,000 to 10,000 are enough (Wu & Johnson 2021, "Rethinking 'Batch' in
BatchNorm", section 3)."""
LEAST_IMAGES = 24
"""With fewer images the statistics are not changed (a guess). A channel that is nearly constant over a few images gets
a variance near zero. Dividing by it multiplies rounding errors: an EfficientNet measured on 12 images failed the
verification of its export."""
AT_ONCE = 64
"""Most images in a batch (a guess; 256 gave the same accuracy)."""


def batch_norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a model that have statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def use_batch_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Return a context in which batch norms normalise by the statistics of each batch, without changing their own.

    Args:
        norms: Batch norms in eval mode.
    """
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True


@contextmanager
def restore_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Return a context that restores the statistics of batch norms at its end."""
    before = [_copy_statistics(norm) for norm in norms]
    try:
        yield
    finally:
        for norm, statistics in zip(norms, before, strict=True):
            _put_back(norm, statistics)


@torch.no_grad()
def measure_batch_norms(model: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Tensor]) -> None:
    """Replace the statistics of batch norms by their mean over some batches.

    All other modules run in eval mode, and the model is left in eval mode. A batch norm that no image reaches keeps its
    statistics, because a model that returns feature maps may stop before its last batch norms.

    Args:
        model: Model with the batch norms.
        norms: Batch norms to measure. The statistics of all others stay unchanged.
        batches: (B, C, H, W) inputs of the model, B > 1. If there are none, the statistics stay unchanged.
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
    """Choose images to measure on, in batches of nearly the same size.

    Args:
        numbers: Indexes of all images.
        most: Most images of a batch. If it is less than 3, batches have 2 or 3 images.

    Returns:
        At most `MEASURED_ON` of the indexes, shuffled in a fixed way because neighbours often have the same class.
        Empty if there are fewer than `LEAST_IMAGES`.
    """
    chosen = [numbers[i] for i in evenly(len(numbers), MEASURED_ON)]
    if len(chosen) < LEAST_IMAGES:
        return []
    shuffled = np.random.default_rng(0).permutation(np.asarray(chosen))
    count = min(-(-len(chosen) // most), len(chosen) // 2)  # no batch has only one image
    return [part.tolist() for part in np.array_split(shuffled, count)]
