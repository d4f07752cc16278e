"""Peak memory of a process."""

from __future__ import annotations

import re
from pathlib import Path


def peak_mib(pid: int | str = "self") -> float:
    """Of a running process, from Linux; 0 once it is gone. `ru_maxrss` would begin at what its parent held."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0
