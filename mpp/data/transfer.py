"""Copy batches to the device while it computes the batch before."""

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
    """Return the batches of a dataset, read ahead by workers. For a GPU they are also copied ahead.

    Args:
        dataset: Dataset that makes the batches.
        sampler: Lists of keys, one for each batch.
        workers: Number of processes that read ahead. 0 means that this process reads.
        device: Device that computes the batches.

    Raises:
        UserError: If the dataset returned one, or a worker died.
    """
    cuda = device.type == "cuda"
    loaded = batches(dataset, sampler, workers=workers, pin_memory=cuda)
    return on_device(loaded, device) if cuda else loaded


def on_device(loaded: Iterator[B], device: torch.device) -> Iterator[B]:
    """Yield the same batches with their tensors on the device, copied one batch ahead on a separate stream.

    This helps if batches are in pinned memory, because then the host does not wait. It does not help on a CPU.
    """
    module = torch.get_device_module(device)
    side = module.Stream()
    underway: deque[tuple[B, object]] = deque()
    last: list[B | None] = [None]
    for batch in chain(loaded, last):
        if batch is not None:
            side.wait_stream(module.current_stream())  # the copy may reuse memory of the batch before last
            with module.stream(side):
                moved = batch.tensors_by(lambda t: t.to(device, non_blocking=True))
                underway.append((moved, side.record_event()))
        if len(underway) > (1 if batch is not None else 0):
            here, copied = underway.popleft()
            module.current_stream().wait_event(copied)
            yield here
