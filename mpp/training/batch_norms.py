"""Batch norms of a model that has learned: statistics of images as it will judge them.

While a model learns, its batch norms follow a moving average of what they see: images that are hidden in part, mixed or
erased, through weights that change. Averaged weights saw none of that. With the statistics of training, fine-tuned
classifiers were 3 points worse, averaged weights in the middle of training 8 (recipes/LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpp.data.shards.reader import evenly

MEASURED_ON = 1024
"""Images that statistics are measured on, if there are so many. 1,000 to 10,000 are enough (Wu & Johnson 2021,
"Rethinking 'Batch' in BatchNorm", section 3)."""
AT_ONCE = 64
"""Images whose statistics are taken together (a guess; 256 gave the same accuracy)."""


def batch_norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a model that have statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def statistics_of_the_batch(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let batch norms that are in eval mode normalise by the statistics of each batch, and keep their own."""
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True


@torch.no_grad()
def measure_batch_norms(model: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Tensor]) -> None:
    """Replace the statistics of batch norms by their mean over some batches.

    Everything else of the model runs in eval mode, in which it is left.

    Args:
        model: Whose they are.
        norms: The batch norms. The statistics of all others stay.
        batches: Of what the model takes, (B, C, H, W) normalised, B > 1. If there is none, the statistics stay.
    """
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for number, images in enumerate(batches):
        for norm in norms if number == 0 else ():
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
            norm.train()
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def choose_batches(numbers: Sequence[int]) -> list[list[int]]:
    """Choose at most `MEASURED_ON` of these numbers, and share them into batches of nearly the same size.

    Neighbours, which often have the same class, come into different batches.
    """
    chosen = [numbers[i] for i in evenly(len(numbers), MEASURED_ON)]
    count = -(-len(chosen) // AT_ONCE)
    return [chosen[start::count] for start in range(count)]
