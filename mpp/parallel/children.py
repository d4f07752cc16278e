"""End child processes, such as those that read and pack images, when their parent ends for any reason."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

LOOK_S = 0.2


def end_with(parent: int) -> None:
    """Let this process end when its parent ends. Call this in the child.

    Otherwise an orphan would keep inherited connections open, so that other processes would not detect the death.

    Args:
        parent: pid of the parent.
    """
    watch_parent(parent, lambda: os._exit(1))


def watch_parent(parent: int, act: Callable[[], None]) -> None:
    """Call a function in a thread of this process as soon as its parent is gone.

    Args:
        parent: pid of the parent.
        act: Function without arguments.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        act()

    threading.Thread(target=watch, daemon=True).start()
