"""Batches on their way to the device, while it is busy with the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor


class Movable(Protocol):
    """A batch whose tensors can be replaced."""

    def tensors_by(self, act: Callable[[Tensor], Tensor]) -> Self: ...


B = TypeVar("B", bound=Movable)


def on_device(batches: Iterator[B], device: torch.device) -> Iterator[B]:
    """The same batches, their tensors on the device: one batch ahead, on a stream of their own.

    Worth it where batches come from pinned memory: the host then waits for none of it. A CPU has nothing to gain.
    """
    module = torch.get_device_module(device)
    side = module.Stream()
    underway: deque[tuple[B, object]] = deque()
    last: list[B | None] = [None]
    for batch in chain(batches, last):
        if batch is not None:
            side.wait_stream(module.current_stream())  # it takes memory again that the batch before last was read from
            with module.stream(side):
                moved = batch.tensors_by(lambda t: t.to(device, non_blocking=True))
                underway.append((moved, side.record_event()))
        if len(underway) > (1 if batch is not None else 0):
            here, copied = underway.popleft()
            module.current_stream().wait_event(copied)
            yield here
