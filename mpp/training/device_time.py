"""Measure the cost of training: CPU time of all processes on CPUs, time of all devices on GPUs."""

from __future__ import annotations

import os
import time
from contextlib import suppress

import psutil

from mpp.parallel.team import Team


class DeviceTime:
    """A clock for the device time of a run, over all processes and all resumes. It starts when it is created.

    Args:
        team: The processes of the run.
        earlier_minutes: Minutes of the run before it was resumed; nan if they are unknown.
    """

    def __init__(self, team: Team, earlier_minutes: float = 0.0) -> None:
        self._team, self.earlier_minutes = team, earlier_minutes
        self._began_s = self._read_s()

    @property
    def key(self) -> str:
        """Key of the minutes in records: cpu_minutes or gpu_minutes."""
        return f"{unit_of(self._team).lower()}_minutes"

    def minutes(self) -> float:
        """Return the minutes so far. Every process calls this."""
        (seconds,) = self._team.sum([self._read_s() - self._began_s])
        return self.earlier_minutes + seconds / 60

    def _read_s(self) -> float:
        return cpu_seconds() if self._team.device.type == "cpu" else time.monotonic()


def cpu_seconds() -> float:
    """Return the CPU time of this process and its children, including loader workers and children that have ended."""
    total = sum(os.times()[:4])
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # the child may end in the meantime
                total += sum(child.cpu_times()[:4])
    return total


def unit_of(team: Team) -> str:
    """Return the unit of the minutes: "CPU" or "GPU"."""
    return "CPU" if team.device.type == "cpu" else "GPU"
