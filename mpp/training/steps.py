"""Parts that both training loops use at every step: micro-batches, reports of the step's results, and the pace."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from mpp.errors import UserError
from mpp.parallel.liveness import Watch
from mpp.parallel.signals import StopRequest
from mpp.parallel.team import Team
from mpp.rng import Purpose, torch_seed
from mpp.runs.log import RunLog
from mpp.training.exchange import Exchange


class LoadedBatch(Protocol):
    """Attributes of a batch that the loops use, for any kind of sample."""

    positions: Tensor
    """(B,) int64: position of each sample in the run's endless sequence."""
    replaced: int
    """Number of images that could not be read and were replaced by others."""
    bad: list[str]
    """A line for each file that could not be read."""


def seed_dropout(seed: int, batch: LoadedBatch) -> None:
    """Seed torch's generators for a micro-batch, by the position of its first sample.

    Dropout and drop path draw from these generators. Call this after the batch has arrived, because a loader that
    starts its workers also draws from torch's generator.
    """
    torch.manual_seed(torch_seed(seed, Purpose.STEP, int(batch.positions[0])))


@contextmanager
def allow_unsaved(log: RunLog, *, required: bool) -> Iterator[None]:
    """Return a context for writing a checkpoint. If writing fails, the run continues with a warning in its log.

    Args:
        log: Log of the run.
        required: Whether the run ends instead.

    Raises:
        UserError: If writing fails and is required.
    """
    try:
        yield
    except UserError as error:
        if required:
            raise
        log.say(f"warning: {error}; the run continues because of if_unsaved")


@dataclass
class Pace:
    """Time since the last logged line."""

    began_s: float = field(default_factory=time.monotonic)
    waited_s: float = 0.0
    """Seconds spent waiting for batches."""
    steps: int = 0

    def begin(self) -> None:
        """Start to measure."""
        self.began_s, self.waited_s, self.steps = time.monotonic(), 0.0, 0

    def rates(self, global_batch: int) -> dict[str, float]:
        """Return images per second and the fraction of time spent waiting for batches, and start again."""
        elapsed_s = max(time.monotonic() - self.began_s, 1e-9)
        rates = {"images_per_s": self.steps * global_batch / elapsed_s, "data_wait": self.waited_s / elapsed_s}
        self.begin()
        return rates


B = TypeVar("B", bound=LoadedBatch)


class MicroBatchStream(Generic[B]):
    """The micro-batches of this process, in the order of the run."""

    def __init__(self, loaded: Iterator[B], per_step: int, watch: Watch, pace: Pace) -> None:
        self._loaded, self._per_step, self._watch, self._pace = loaded, per_step, watch, pace

    def of_step(self, step: int) -> Iterator[tuple[B, bool]]:
        """Yield each micro-batch of a step, and whether it is the last one."""
        for m in range(self._per_step):
            self._watch.at(step, "reading images")
            asked_s = time.monotonic()
            batch = next(self._loaded)
            self._pace.waited_s += time.monotonic() - asked_s
            self._watch.at(step, "computing")
            yield batch, m == self._per_step - 1


@dataclass(frozen=True)
class StepReport:
    """The results of one optimizer step, over all processes."""

    step: int
    """Number of the step, from 0."""
    losses: list[float]
    """Mean of each loss over the global batch."""
    grad_norm: float
    unreadable: int
    """Number of images that were replaced."""
    unreadable_lines: list[str]
    """A line for each file that this process could not read."""
    micro_losses: list[Tensor]
    """(losses,) losses of each micro-batch of this process, divided by the number of micro-batches."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are finite. The device uses the same numbers to decide about the update."""
        return all(map(math.isfinite, (*self.losses, self.grad_norm)))


@dataclass
class _Sent:
    """A report on its way from the device."""

    step: int
    exchange: Exchange
    micro_losses: list[Tensor]
    unreadable_lines: list[str]


class StepReports:
    """The one exchange of a step. It is sent at once and read one step later, so that the host never waits.

    Losses, counts of unreadable images and requests to stop are summed over all processes. The device decides whether a
    step is finite.
    """

    def __init__(self, team: Team, stop_request: StopRequest) -> None:
        self._team, self._stop_request = team, stop_request
        self._sent: deque[_Sent] = deque()
        self._micro_losses: list[Tensor] = []
        self._unreadable_lines: list[str] = []
        self._replaced = 0
        self.stopping = False
        """Whether a process was asked to stop, the same on all processes."""

    def add(self, batch: LoadedBatch, losses: Tensor) -> None:
        """Add the results of a micro-batch to the report of the step.

        Args:
            batch: The micro-batch.
            losses: (losses,) losses, divided by the number of micro-batches of a step.
        """
        self._micro_losses.append(losses.detach())
        self._unreadable_lines += batch.bad
        self._replaced += batch.replaced

    def send(self, step: int, grad_norm: Tensor) -> Tensor:
        """Start the exchange of a step.

        Args:
            step: Number of the step, from 0.
            grad_norm: () norm of the gradient, on the device, the same on every process.

        Returns:
            () bool on the device: whether loss and gradient are finite.
        """
        losses = torch.stack(self._micro_losses).sum(0) / self._team.world
        exchange = Exchange(self._team, losses, [self._replaced, bool(self._stop_request)], grad_norm)
        self._sent.append(_Sent(step, exchange, self._micro_losses, self._unreadable_lines))
        self._micro_losses, self._unreadable_lines, self._replaced = [], [], 0
        return exchange.summed.isfinite().all() & grad_norm.isfinite()

    def arrived(self, *, everything: bool) -> Iterator[StepReport]:
        """Yield the reports that can be read without waiting: all but the newest.

        If a single process is asked to stop, the newest report is included at once. Several processes detect the
        request in the exchange, and then read the remaining reports together.

        Args:
            everything: Whether to include the newest report, because it is about to be logged or saved.
        """
        everything = everything or (self._team.world == 1 and bool(self._stop_request))
        while len(self._sent) > (0 if everything or self.stopping else 1):
            sent = self._sent.popleft()
            *losses, unreadable, to_stop, grad_norm = sent.exchange.read()
            self.stopping = self.stopping or bool(to_stop)
            yield StepReport(sent.step, losses, grad_norm, int(unreadable), sent.unreadable_lines, sent.micro_losses)
