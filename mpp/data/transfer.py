"""Batches on their way to the device, while it is busy with the one before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mpp.types import Batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, their tensors on the device: copied one batch ahead, on a stream of their own.

    Worth it where batches come from pinned memory: the host then waits for none of it. A CPU has nothing to gain.
    """
    module = torch.get_device_module(device)
    side = module.Stream()
    here: tuple[Batch, object] | None = None
    for batch in batches:
        side.wait_stream(module.current_stream())  # it takes memory again that the batch before last was read from
        with module.stream(side):
            for name in ("images", "mask", "noise"):
                setattr(batch, name, getattr(batch, name).to(device, non_blocking=True))
            copied = side.record_event()
        if here is not None:
            module.current_stream().wait_event(here[1])
            yield here[0]
        here = batch, copied
    if here is not None:
        module.current_stream().wait_event(here[1])
        yield here[0]
