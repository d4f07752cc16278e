"""Handle signals that ask a run to stop."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from mpp.parallel import streams
from mpp.parallel.team import Team

SAME_PRESS_S = 1.0
"""Seconds within which a second SIGINT counts as the same Ctrl-C, because torchrun forwards the signal that the
terminal has already sent to all processes."""


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.by: str | None = None
        """Name of the signal; None if there was none."""
        self.at = -math.inf
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.by is not None

    @property
    def reason(self) -> str:
        """Why the run stops, for its log and its status."""
        return self.by or "a signal to another process"

    def listen(self) -> None:
        """Let the signals of `ending_signals` set the request from now on. A second SIGINT stops the run at once.

        Outside of the main thread, as in some notebooks and servers, signal handlers are not changed.
        """
        with suppress(ValueError):  # not the main thread
            for number in ending_signals():
                self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.by == "SIGINT":
            if now - self.at < SAME_PRESS_S:
                return
            raise KeyboardInterrupt
        self.at = now
        again = " (Ctrl-C again stops at once)" if number == signal.SIGINT else ""
        self._stop(signal.Signals(number).name, again)

    def _stop(self, by: str, note: str = "") -> None:
        """Set the request and print a line, bypassing Python's streams, which may be in the middle of a line."""
        if by == "SIGPIPE" and self.by:
            return
        self.by = by
        with suppress(OSError):
            os.write(2, f"{by}: finishing the step, then saving{note}\n".encode())

    def of_all(self, team: Team) -> str:
        """Return the name of the signal that a process received, the same on all. Every process calls this."""
        return next((by for by in team.gather([self.by]) if by), signal.SIGTERM.name)

    def __enter__(self) -> StopRequest:
        streams.on_broken_pipe = lambda: self._stop("SIGPIPE")
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the signal handlers.

        This context must be the last one left. If a process has died, the launcher ends the others, but they must
        report the error first.
        """
        streams.on_broken_pipe = None
        for number, handler in self._before.items():
            signal.signal(number, handler)


def ending_signals() -> list[signal.Signals]:
    """Return the signals that ask a run to end. SIGHUP, which a closed terminal sends, is left out under `nohup`."""
    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    return [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *hangup]


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Return a context whose code ends at once on the signals of `ending_signals`.

    SIGINT raises KeyboardInterrupt, the others SystemExit(128 + number). SIGINT also works if a shell started the
    process in the background, where it is ignored by default. Outside of the main thread, signal handlers are not
    changed.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    before: dict[int, Any] = {}
    with suppress(ValueError):  # not the main thread
        for number in ending_signals():
            before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
