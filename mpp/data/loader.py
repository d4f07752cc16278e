"""Batches that worker processes read ahead, in the order of the sampler."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Protocol

import torch.distributed as dist
from torch.utils.data import DataLoader

from mpp.errors import UserError
from mpp.parallel.children import end_with
from mpp.parallel.workers import of_a_worker, worker_died

READ_AHEAD = 4
"""Batches that each worker reads ahead."""
QUIET_S = 0.05
"""Before workers are forked. Just after an exchange threads of gloo's enter Python, and a CPython (3.11) that is forked
then may leave the child waiting for ever for a lock that such a thread had: 3 of some 20,000 forks."""


class KeyedDataset(Protocol):
    """A dataset of which a list of keys makes a batch, always the same one."""

    def __getitems__(self, keys: list[Any]) -> Any: ...


def _as_it_is(batch: object) -> object:
    return batch


def _serve_the_parent_alone(worker: int) -> None:
    """A scheduler may signal every process of a job; the loop still needs batches to finish its step.

    Workers end when the loop closes the loader, or with its process.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with(os.getppid())
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            shown(kind, error, trace)

    # multiprocessing shows here that a parent ended while a batch was handed over; the parent has said why
    sys.excepthook = hook


def batches(dataset: KeyedDataset, sampler: Iterable[list[Any]], *, workers: int, pin_memory: bool) -> Iterator[Any]:
    """Give what `dataset.__getitems__` makes of the sampler's lists, in their order.

    Args:
        dataset: The data.
        sampler: Lists of keys, one for each batch.
        workers: Processes that read ahead; 0: this one reads.
        pin_memory: Whether tensors come in pinned memory, from which copies to a GPU do not wait.

    Raises:
        UserError: A worker met one, or died.
    """
    # more workers than cores may be wanted where they wait for a disk; `mpp doctor` and data_wait are there to look at
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]  # only __getitems__ is called
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=READ_AHEAD if workers else None,
        worker_init_fn=_serve_the_parent_alone,
    )
    if workers and dist.is_available() and dist.is_initialized():
        time.sleep(QUIET_S)
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (RuntimeError, EOFError, OSError) as error:
        if not workers or (isinstance(error, RuntimeError) and not of_a_worker(error)):
            raise
        if isinstance(error, RuntimeError):
            raise worker_died(error) from error
        try:
            time.sleep(1)  # it died while it handed over a batch; the system says so a little later
        except RuntimeError as report:
            raise worker_died(report) from error
        raise worker_died(error) from error


@atexit.register
def _kill_workers() -> None:
    """Workers ignore the SIGTERM with which multiprocessing ends them when an error ends their parent."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises
    for child in workers:
        child.kill()
