"""Recognize that a loader worker died, and say so in one line."""

from __future__ import annotations

from mpp.errors import UserError


def of_a_worker(error: BaseException) -> bool:
    """Whether it is torch's word that a worker died: raised wherever the main thread is at that moment."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def worker_died(error: BaseException) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"data.workers: {reason} Out of memory? Go on with --resume auto")
