"""Peak memory of a process, and of its tensors on the GPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def peak_mib(pid: int | str = "self") -> float:
    """Return the peak memory of a running process from Linux, 0 once it is gone.

    `ru_maxrss` would begin at the memory of its parent.
    """
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def device_peak_mib() -> float:
    """Return the peak memory of tensors on this process's GPU, 0 without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    return float(torch.cuda.max_memory_allocated()) / 2**20
