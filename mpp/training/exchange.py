"""Exchange the numbers of a step between all processes, and divide a global batch into micro-batches."""

from __future__ import annotations

import torch

from mpp.errors import UserError
from mpp.parallel.team import Team


def accumulation(global_batch: int, world: int, max_batch_per_device: int, views: int = 1) -> int:
    """Return the number of micro-batches of a step on each process: the smallest with equal micro-batches that fit.

    Args:
        global_batch: Samples of a step over all processes.
        world: Number of processes.
        max_batch_per_device: Most samples of a micro-batch.
        views: Number of samples that are views of one image and stay in one micro-batch.

    Raises:
        UserError: If there is no such division. With several views, a micro-batch must hold those of two images,
            because agreement compares images.
    """
    if global_batch % world:
        raise UserError(
            f"optim.global_batch_size: {global_batch} cannot be divided among {world} processes; "
            f"expected a multiple of {world}"
        )
    share, least = global_batch // world, 2 * views if views > 1 else 1
    for n in range(1, share + 1):
        size, rest = divmod(share, n)
        if not rest and size % views == 0 and least <= size <= max_batch_per_device:
            return n
    raise UserError(
        f"optim.global_batch_size: {share} samples of a process cannot be divided into equal micro-batches that hold "
        f"all {views} views (agreement.views) of at least two images, {least} samples, and at most "
        f"{max_batch_per_device} (optim.max_batch_per_device)"
    )


def describe_batch(global_batch: int, world: int, micro_batches: int, views: int = 1) -> str:
    """Return a description of a step's batch, such as "64 images" or "512 images (8 processes × 2 micro-batches × 32)".

    Args:
        global_batch: Samples of a step over all processes.
        world: Number of processes.
        micro_batches: Micro-batches of a step on each process.
        views: Number of samples that are views of one image.
    """
    factors = [f"{world} processes"] * (world > 1) + [f"{micro_batches} micro-batches"] * (micro_batches > 1)
    shares = f" ({' × '.join([*factors, str(global_batch // world // micro_batches)])})" if factors else ""
    return f"{global_batch // views:,} images{f' in {views} views each' if views > 1 else ''}{shares}"


class Exchange:
    """The numbers of a step from all processes, on their way to the host. The host waits only when it reads them.

    Args:
        team: The processes of the run.
        summands: (K,) numbers of this process, on the device.
        counts: Numbers of this process, on the host. They are summed with `summands` in float64, so that counts stay
            exact.
        alike: () number on the device that is the same in every process.
    """

    def __init__(self, team: Team, summands: torch.Tensor, counts: list[float], alike: torch.Tensor) -> None:
        device = team.device
        known = torch.tensor(counts, dtype=torch.float64)
        if device.type == "cuda":  # a copy from pageable memory would wait for the device
            known = known.pin_memory()
        values = torch.cat([summands.double(), known.to(device, non_blocking=True)])
        values = team.sum_tensor(values)
        self.summed = values[: len(summands)]
        """(K,) sums of `summands` over all processes, on the device."""
        values = torch.cat([values, alike.double().view(1)])
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=device.type == "cuda")
        self._host.copy_(values, non_blocking=True)
        self._arrived = torch.get_device_module(device).Event()
        self._arrived.record()

    def read(self) -> list[float]:
        """Wait for the device, and return the sums of `summands`, the sums of `counts`, and `alike`."""
        self._arrived.synchronize()
        return self._host.tolist()
