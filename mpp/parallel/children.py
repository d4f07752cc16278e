"""Processes that read and pack for another one end with it, however that ended."""

from __future__ import annotations

import os
import threading
import time

LOOK_S = 0.2


def end_with(parent: int) -> None:
    """Call it in the child. An orphan would hold on to what it inherited: connections that tell others of a death."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
