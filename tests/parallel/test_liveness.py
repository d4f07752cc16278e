"""Which processes are gone, as far as this machine can tell."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mpp.parallel.liveness import SAVING, Watch, _gone, _here


@pytest.fixture
def dead() -> int:
    """Return the number of a process that has ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_who_is_gone(dead: int) -> None:
    assert not _gone(None)
    assert not _gone(_here())
    assert _gone({**_here(), "pid": dead})


@pytest.mark.parametrize("elsewhere", [{"host": "another"}, {"pids": "pid:[1]"}])
def test_numbers_of_other_machines_and_containers_say_nothing(elsewhere: dict[str, Any], dead: int) -> None:
    assert not _gone({**_here(), "pid": dead, **elsewhere})


def test_a_dead_one_that_nobody_has_waited_for_is_gone() -> None:
    child = subprocess.Popen(["true"])
    deadline = time.monotonic() + 10
    while not _gone({**_here(), "pid": child.pid}):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert os.path.exists(f"/proc/{child.pid}")
    child.wait()


def test_only_after_a_while_and_not_while_something_is_saved(
    dead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(0, 2, tmp_path, hang_timeout_s=60)
    own = {**_here(), "word": None, "done": False}
    other = {**own, "pid": dead}
    watch._known = {0: own, 1: other}
    monkeypatch.setattr(watch, "_states", lambda: watch._known)
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(2):
        assert watch._unnoticed() is None, "nothing has begun"
        now += 6
    watch.at(3, "computing")
    assert watch._unnoticed() is None, "the process may still be reported"
    now += 6
    watch.at(3, SAVING)
    assert watch._unnoticed() is None, "what is being saved would be lost"
    watch.at(4, "computing")
    assert watch._unnoticed() == f"process 1 (pid {dead} on {other['host']}) is gone"
    watch._known[1] = {**other, "done": True}
    assert watch._unnoticed() is None, "it had finished"
