"""Named points at which a test makes a process die, hang or lose a file. Nothing happens unless MPP_FAULT says so.

MPP_FAULT is JSON: {"point": NAME, "do": ACTION}, and, where given, "rank" (of the process that it happens in; 0),
"nth" (time that the point is reached; 1) and "victim" (rank of the process that is killed; the same). A file named by
MPP_FAULT_TRACE gets a line, `RANK NAME`, for each point that is reached.
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
    """Let other processes of the run find this one, where a fault may ask them to."""
    if "MPP_FAULT" in os.environ and "victim" in json.loads(os.environ["MPP_FAULT"]):
        Path(os.environ["MPP_FAULT_PIDS"], os.environ.get("RANK", "0")).write_text(str(os.getpid()))


def point(name: str, file: Path | None = None) -> None:
    """Mark a place where a run may be broken on purpose, by tests.

    Args:
        name: Of the place.
        file: What was just written; "halve" cuts it in two before the process dies, as a death inside the writing does.
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
        case "kill_leaving_a_child":  # which holds its connections: nobody is told that they ended
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
