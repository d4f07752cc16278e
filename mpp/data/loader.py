"""Load batches in worker processes, ahead of time and in the order of the sampler."""

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
"""Pause in seconds before workers are forked. Just after a collective, threads of gloo enter Python. If CPython (3.11)
is forked then, the child may wait forever for a lock that one of these threads held: 3 of some 20,000 forks."""


class KeyedDataset(Protocol):
    """A dataset that makes a batch from a list of keys, always the same batch for the same keys."""

    def __getitems__(self, keys: list[Any]) -> Any: ...


def _as_it_is(batch: object) -> object:
    return batch


def _serve_the_parent_alone(worker: int) -> None:
    """Ignore signals in a worker process.

    A scheduler may signal every process of a job, but the loop still needs batches to finish its step. Workers end when
    the loop closes the loader, or when its process ends.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with(os.getppid())
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            shown(kind, error, trace)

    # If the parent ends while it receives a batch, multiprocessing would print an error here. The parent has already
    # printed the reason.
    sys.excepthook = hook


def batches(dataset: KeyedDataset, sampler: Iterable[list[Any]], *, workers: int, pin_memory: bool) -> Iterator[Any]:
    """Yield the batches that `dataset.__getitems__` makes from the sampler's lists of keys, in their order.

    Args:
        dataset: Dataset that makes the batches.
        sampler: Lists of keys, one for each batch.
        workers: Number of processes that read ahead. 0 means that this process reads.
        pin_memory: Whether tensors are put into pinned memory, from which they are copied to a GPU without waiting.

    Raises:
        UserError: If the dataset returned one, or a worker died.
    """
    # More workers than cores can help if they wait for a disk. `mpp doctor` and data_wait show whether that is so.
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
            time.sleep(1)  # the worker died while it sent a batch; the system reports that a little later
        except RuntimeError as report:
            raise worker_died(report) from error
        raise worker_died(error) from error


@atexit.register
def _kill_workers() -> None:
    """Kill the workers at exit.

    If an error ends their parent, multiprocessing sends SIGTERM to the workers, but they ignore it.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for child in workers:
        child.kill()
