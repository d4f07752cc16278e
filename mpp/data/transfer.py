"""Batches on their way to the device, while it is busy with the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from mpp.data.loader import KeyedDataset, batches


class Movable(Protocol):
    """A batch whose tensors can be replaced."""

    def tensors_by(self, act: Callable[[Tensor], Tensor]) -> Self: ...


B = TypeVar("B", bound=Movable)


def load_ahead(
    dataset: KeyedDataset, sampler: Iterable[list[Any]], *, workers: int, device: torch.device
) -> Iterator[Any]:
    """Give the batches of a dataset, read ahead by workers, and for a GPU also copied ahead.

    Args:
        dataset: The data.
        sampler: Lists of keys, one for each batch.
        workers: Processes that read ahead; 0: this one reads.
        device: Where they are computed on.

    Raises:
        UserError: A worker met one, or died.
    """
    cuda = device.type == "cuda"
    loaded = batches(dataset, sampler, workers=workers, pin_memory=cuda)
    return on_device(loaded, device) if cuda else loaded


def on_device(loaded: Iterator[B], device: torch.device) -> Iterator[B]:
    """The same batches, their tensors on the device: one batch ahead, on a stream of their own.

    Worth it where batches come from pinned memory: the host then waits for none of it. A CPU has nothing to gain.
    """
    module = torch.get_device_module(device)
    side = module.Stream()
    underway: deque[tuple[B, object]] = deque()
    last: list[B | None] = [None]
    for batch in chain(loaded, last):
        if batch is not None:
            side.wait_stream(module.current_stream())  # it takes memory again that the batch before last was read from
            with module.stream(side):
                moved = batch.tensors_by(lambda t: t.to(device, non_blocking=True))
                underway.append((moved, side.record_event()))
        if len(underway) > (1 if batch is not None else 0):
            here, copied = underway.popleft()
            module.current_stream().wait_event(copied)
            yield here
