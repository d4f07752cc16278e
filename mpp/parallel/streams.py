"""Keep a run going if its output fails: the terminal was closed, nobody reads the pipe, or the disk is full.

The records of a run are in its folder, so output on the terminal may be lost. Outside of a run, a failed write is an
error as usual.
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
"""Errors of a write to a stream that no longer accepts output."""

on_broken_pipe: Callable[[], object] | None = None
"""Function that a run calls if nobody reads its stdout any more. None means that no run is in progress."""


class _Lasting(io.FileIO):
    """The file of a stream. While a run is in progress, failed writes are dropped."""

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)  # None if a non-blocking pipe is full
        except OSError as error:
            # A closed terminal is not an error outside of a run either, because nobody could read the message.
            if error.errno not in LOST or (on_broken_pipe is None and error.errno != errno.EIO):
                raise
            if error.errno == errno.EPIPE and self.fileno() == 1 and on_broken_pipe is not None:
                on_broken_pipe()
            return len(data)


def keep_output_open() -> None:
    """Let stdout and stderr of this process accept any text, and drop failed writes as described in the module.

    Streams that other code has put in their place are not changed.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process; the next opened file would get its file descriptor
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
        elif stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
                buffering = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
                raw = io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False))
                setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", **buffering))
