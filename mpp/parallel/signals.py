"""Signals that ask a run to stop."""

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
"""A second SIGINT within so many seconds is the same Ctrl-C: torchrun passes on what the terminal sent to all."""


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.by: str | None = None
        """The signal's name."""
        self.at = -math.inf
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.by is not None

    @property
    def reason(self) -> str:
        """Why the run stops, as its log and its status say it."""
        return self.by or "a signal to another process"

    def listen(self) -> None:
        """From now on the signals of `ending_signals` set the request; a second SIGINT stops at once.

        Outside the main thread (a notebook's, a server's) signals are left as they are.
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
        """Set the request. The words go past Python's streams, which may be in the middle of a line."""
        if by == "SIGPIPE" and self.by:
            return
        self.by = by
        with suppress(OSError):
            os.write(2, f"{by}: finishing the step, then saving{note}\n".encode())

    def of_all(self, team: Team) -> str:
        """The name of the signal that some process got, the same on all of them, which call this together."""
        return next((by for by in team.gather([self.by]) if by), signal.SIGTERM.name)

    def __enter__(self) -> StopRequest:
        streams.on_broken_pipe = lambda: self._stop("SIGPIPE")
        return self

    def __exit__(self, *_: object) -> None:
        """Signals are what they were. It is the last to leave: a launcher that ends the processes of a run in which one
        has died must not end them before they have said so.
        """
        streams.on_broken_pipe = None
        for number, handler in self._before.items():
            signal.signal(number, handler)


def ending_signals() -> list[signal.Signals]:
    """Signals by which a run is asked to end. A closed terminal sends SIGHUP, which `nohup` has ignored."""
    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    return [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *hangup]


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let the signals of `ending_signals` end what runs inside at once: SystemExit(128 + number), or KeyboardInterrupt.

    They also do if a shell started the process in the background, which leaves SIGINT ignored. Outside the main thread
    signals are left as they are.
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
