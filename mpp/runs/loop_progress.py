"""Show the progress of loops that have no log: bars on a terminal, else a line from time to time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from mpp.runs.log import format_duration

T = TypeVar("T")
LINE_EVERY_S = 10.0
"""Least seconds between lines of progress, which replace the bar if there is no terminal."""


class LoopProgress:
    """Progress of several loops: bars on a terminal, else a line at most every LINE_EVERY_S, over all loops."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def shown(self, items: Iterable[T], what: str, total: int, *, time_left: bool = True) -> Iterator[T]:
        """Yield the items and show the progress.

        Args:
            items: Items of the loop.
            what: Text before the numbers.
            total: Number of items.
            time_left: Whether the time left in this loop is shown. If the loop is one of many, it would mislead.
        """
        if sys.stderr.isatty():
            yield from tqdm(items, what, total, leave=False)
            return
        began = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if now - self.last >= LINE_EVERY_S:
                self.last = now
                left = f", {format_duration((now - began) / done * (total - done))} left" if time_left else ""
                print(f"{what} {done} of {total}{left}", flush=True)
