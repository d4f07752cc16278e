"""The clock that measures the cost of training."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

from mpp.parallel.team import start_team
from mpp.training.device_time import DeviceTime, cpu_seconds, unit_of

BUSY = "import time\nwhile time.process_time() < {}: pass\n"


def spend(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_it_counts_work_and_not_waiting_and_goes_on_after_a_resume() -> None:
    team = start_team("fp32")
    spend(0.2)
    clock = DeviceTime(team, earlier_minutes=2.0)
    time.sleep(0.3)
    spend(0.3)
    ticks_s = 2 / os.sysconf("SC_CLK_TCK")  # user and system time are each rounded down to a tick
    assert 0.3 - ticks_s < (clock.minutes() - 2.0) * 60 < 0.45, (
        "only the 0.3 s of work count, not earlier work or sleep"
    )
    assert (unit_of(team), clock.key) == ("CPU", "cpu_minutes")
    assert math.isnan(DeviceTime(team, math.nan).minutes()), "minutes that were not recorded stay unknown"


def of_children() -> float:
    """Return the CPU seconds without those of this process, which grow while it measures."""
    return cpu_seconds() - sum(os.times()[:2])


def test_children_count_while_they_run_and_when_they_have_ended() -> None:
    before, until = of_children(), time.monotonic() + 30
    with subprocess.Popen([sys.executable, "-c", BUSY.format(0.6) + "input()"], stdin=subprocess.PIPE) as child:
        while of_children() - before < 0.45:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert child.poll() is None, "the child must still be running while its time is counted"
        child.communicate(b"\n")
    assert of_children() - before >= 0.5
