"""Output that never ends a run: to a terminal that was closed, a pipe that nobody reads, a full disk.

A run's records are in its folder, so words on the terminal may be lost. Outside of a run a failed write is an error as
usual.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any

LOST = (errno.EIO, errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF)
"""Errors of a write to a stream that takes nothing more."""

on_broken_pipe: Callable[[], object] | None = None
"""What a run in progress does if nobody reads its stdout any more; None: no run is in progress."""


class _Lasting(io.FileIO):
    """The file of a stream, whose failed writes are dropped while a run is in progress."""

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)  # None if a pipe that does not wait is full
        except OSError as error:
            # a closed terminal is no error outside of a run either: nobody could read about it
            if error.errno not in LOST or (on_broken_pipe is None and error.errno != errno.EIO):
                raise
            if error.errno == errno.EPIPE and self.fileno() == 1 and on_broken_pipe is not None:
                on_broken_pipe()
            return len(data)


def keep_output_open() -> None:
    """Let stdout and stderr of this process take any text, and fail as the module says. Streams that somebody else has
    put in their place stay as they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the process; the next file that is opened would get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
        elif stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
                buffering = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
                raw = io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False))
                setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", **buffering))
