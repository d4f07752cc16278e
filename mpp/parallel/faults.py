"""Named points at which a test makes a process die, hang or damage a file. Nothing happens unless MPP_FAULT is set.

MPP_FAULT is JSON: {"point": NAME, "do": ACTION}. Optional keys:

* "rank": rank of the process in which the fault happens, by default 0
* "nth": how often the point is reached until the fault happens, by default 1
* "victim": rank of the process to kill, by default the same process

A file named by MPP_FAULT_TRACE gets a line, `RANK NAME`, for each point that is reached.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

from mpp.recipe.flat import JsonObject

_reached: Counter[str] = Counter()


def announce() -> None:
    """Write the pid of this process to a file for other processes, if the planned fault has a victim."""
    if "MPP_FAULT" in os.environ and "victim" in json.loads(os.environ["MPP_FAULT"]):
        Path(os.environ["MPP_FAULT_PIDS"], os.environ.get("RANK", "0")).write_text(str(os.getpid()))


def point(name: str, file: Path | None = None) -> None:
    """Mark a point at which tests may break a run on purpose.

    Args:
        name: Name of the point.
        file: File that was just written. The action "halve" cuts it to half its size and kills the process, as if the
            process had died while writing.
    """
    trace, fault = os.environ.get("MPP_FAULT_TRACE"), os.environ.get("MPP_FAULT")
    if trace is None and fault is None:
        return
    rank = os.environ.get("RANK", "0")
    if trace is not None:
        with open(trace, "a") as lines:
            lines.write(f"{rank} {name}\n")
    planned: JsonObject = json.loads(fault) if fault else {}
    if planned.get("point") != name or str(planned.get("rank", 0)) != rank:
        return
    _reached[name] += 1
    if _reached[name] == planned.get("nth", 1):
        _happen(planned, file)


def _happen(fault: JsonObject, file: Path | None) -> None:
    match fault["do"]:
        case "kill":
            victim = fault.get("victim")
            pid = os.getpid() if victim is None else int(Path(os.environ["MPP_FAULT_PIDS"], str(victim)).read_text())
            os.kill(pid, signal.SIGKILL)
        case "halve":
            assert file is not None
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill_leaving_a_child":  # the child holds the connections, so no process is notified that they ended
            if os.fork() == 0:
                time.sleep(fault["seconds"])
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise RuntimeError("as MPP_FAULT says")
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(fault["seconds"])
        case other:
            raise ValueError(f"MPP_FAULT: {other}: no such thing to do")
