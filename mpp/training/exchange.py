"""The numbers of a step that all processes exchange, and micro-batches of a global batch."""

from __future__ import annotations

import torch

from mpp.errors import UserError
from mpp.parallel.team import Team


def accumulation(global_batch: int, world: int, max_batch_per_device: int) -> int:
    """Return how many micro-batches a step has on each process: the fewest that fit.

    Args:
        global_batch: Images of a step over all processes.
        world: How many processes there are.
        max_batch_per_device: Images that fit at a time.

    Raises:
        UserError: They cannot be equal.
    """
    if global_batch % world:
        raise UserError(
            f"optim.global_batch_size: {global_batch} cannot be divided among {world} processes; "
            f"expected a multiple of {world}"
        )
    share = global_batch // world
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= max_batch_per_device)


def describe_batch(global_batch: int, world: int, micro_batches: int) -> str:
    """Say what a step takes: 64 images; 512 images (8 processes × 2 micro-batches × 32).

    Args:
        global_batch: Images of a step over all processes.
        world: How many processes there are.
        micro_batches: Of a step on each process.
    """
    factors = [f"{world} processes"] * (world > 1) + [f"{micro_batches} micro-batches"] * (micro_batches > 1)
    shares = f" ({' × '.join([*factors, str(global_batch // world // micro_batches)])})" if factors else ""
    return f"{global_batch:,} images{shares}"


class Exchange:
    """A step's numbers from all processes, on their way to the host, which waits for them only when it reads them.

    Args:
        summands: (K,) numbers of this process.
        counts: Numbers that the host knows. They are summed with `summands` in float64, so that counts stay exact.
        alike: () number that is the same in every process.
    """

    def __init__(self, team: Team, summands: torch.Tensor, counts: list[float], alike: torch.Tensor) -> None:
        device = team.device
        known = torch.tensor(counts, dtype=torch.float64)
        if device.type == "cuda":  # from pageable memory a copy waits for the device
            known = known.pin_memory()
        values = torch.cat([summands.double(), known.to(device, non_blocking=True)])
        values = team.sum_tensor(values)
        self.summed = values[: len(summands)]
        """(K,) over all processes, on the device."""
        values = torch.cat([values, alike.double().view(1)])
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=device.type == "cuda")
        self._host.copy_(values, non_blocking=True)
        self._arrived = torch.get_device_module(device).Event()
        self._arrived.record()

    def read(self) -> list[float]:
        """Return the sums of `summands`, the sums of `counts`, and `alike`. Waits for the device."""
        self._arrived.synchronize()
        return self._host.tolist()
