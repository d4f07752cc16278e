"""Detect that a loader worker died, and report it in one line."""

from __future__ import annotations

from mpp.errors import UserError


def of_a_worker(error: BaseException) -> bool:
    """Return whether an error is torch's report that a worker died. It can be raised anywhere in the main thread."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def worker_died(error: BaseException) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"data.workers: {reason.removesuffix('.')}; out of memory? Continue with --resume auto")
