"""The lines of a run's records."""

from __future__ import annotations

import math
import os
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpp.errors import MppWarning
from mpp.runs.log import Lines, RunLog, format_duration


def test_lines_wait_where_there_is_no_space_and_come_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("first\n")
    lines = Lines(path)
    file, full = os.dup(lines._file.fileno()), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, lines._file.fileno())
    with pytest.warns(MppWarning, match=r"metrics\.jsonl: No space left on device; its lines wait"):
        lines.write("second")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned once
        lines.write("third")
    os.dup2(file, lines._file.fileno())
    lines.write("fourth")
    assert path.read_text() == "first\nsecond\nthird\nfourth\n"
    lines.close()
    os.close(file)
    os.close(full)


def test_time_left_is_told_of_the_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first line does not count, in which dataloaders and kernels start, and a change of pace soon does."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    log = RunLog(tmp_path, steps=1000, resumed_at=0, active=True)
    for step, took in ((1, 60.0), (51, 50.0), (101, 50.0), *((s, 100.0) for s in range(151, 402, 50))):
        now += took
        log.metrics({"step": step, "loss": 0.5, **({"skill": 0.25} if step == 101 else {})})
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/1000  loss 0.5", "one line does not tell the time that is left"
    assert lines[1].endswith("  eta 15:49"), "949 steps of a second, without the first step's minute"
    assert lines[-1].endswith("  eta 19:58"), (
        "599 steps of two seconds: at step 401, five lines in a row took 100 s each"
    )
    assert [line for line in lines if "skill" in line] == ["step 101/1000  loss 0.5  skill 0.25  eta 14:59"]


def test_a_bar_shows_what_is_known_and_nothing_that_no_longer_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(tmp_path, steps=9, resumed_at=0, active=True)
    shown: list[str] = []
    monkeypatch.setattr(log, "bar", SimpleNamespace(set_postfix_str=shown.append, close=lambda: None))
    for record in ({"loss": 0.5, "skill": 0.25}, {"loss": 0.4}, {"loss": math.nan}):
        log.metrics({"step": 1, **record})
    log.close()
    assert shown == ["loss 0.5  skill 0.25", "loss 0.4  skill 0.25", "skill 0.25"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (3600, "1:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
