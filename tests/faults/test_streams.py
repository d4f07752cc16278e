"""Output that fails ends no run before it is saved: closed terminals, pipes without a reader, full disks, other
encodings.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpp.runs.records import checkpoints_in, read_metrics
from tests.conftest import command, pretrain_values

pytestmark = pytest.mark.slow
CLOSED = "A closed terminal saves a checkpoint (exit code 129); with nohup and disown the run continues"
LOST = "Output that cannot be written (closed, full, no reader, ASCII) ends no run before it is saved"
LONG = {"optim.steps": 100_000, "checkpoint_every_steps": 100_000, "log_every_steps": 1}


@pytest.fixture
def started(shards: Path, tmp_path: Path) -> Any:
    """Start a long pretraining run, and kill it at the end."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*words: str, before: str = "", env: dict[str, str] | None = None, **streams: Any) -> Any:
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(pretrain_values(shards, tmp_path / "run", **LONG)))
        line = f"{before} {sys.executable} -m mpp pretrain {tmp_path / 'r.yaml'} {' '.join(words)}"
        run = subprocess.Popen(
            ["bash", "-c", line],
            start_new_session=True,
            env={**os.environ, **(env or {})},
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup
            **streams,
        )
        processes.append(run)
        return run

    yield start
    for run in processes:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


def wait_for(happens: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def logged(run: Path, count: int) -> Callable[[], bool]:
    return lambda: len(read_metrics(run)) >= count if run.exists() else False


def terminal() -> tuple[int, int]:
    """Return both ends of a terminal of 24 lines and 80 columns, on which a progress bar is drawn."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    return ours, theirs


def read_until(happens: Callable[[], bool], terminal: int, seconds: float = 60) -> None:
    """Read what a terminal shows until something happens."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen in time"
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 65536)


def saved_by(run: Path, why: str) -> None:
    """Check that there is a checkpoint of the last step, and that the status records what ended the run."""
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["why"]) == ("stopped", why)
    (found,) = checkpoints_in(run / "checkpoints")
    assert int(found.name[5:]) == read_metrics(run)[-1]["step"] == status["step"]


@pytest.mark.promise(CLOSED)
def test_a_terminal_that_is_closed(started: Any, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and every later write to the terminal fails."""
    ours, theirs = terminal()
    take_terminal = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    run = started(
        "data.workers=1",
        before=f"exec {sys.executable} -c '{take_terminal}'",
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    read_until(logged(tmp_path / "run", 5), ours)
    os.close(ours)
    assert run.wait(60) == 129
    saved_by(tmp_path / "run", "SIGHUP")


@pytest.mark.promise(CLOSED)
def test_a_run_outlives_its_terminal_if_it_ignores_the_signal(started: Any, tmp_path: Path) -> None:
    """After `disown` or under `nohup`, the run continues, and saves when it is asked to."""
    ours, theirs = terminal()
    run = started(before="trap '' HUP; exec", stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    read_until(logged(tmp_path / "run", 5), ours)
    os.close(ours)
    os.kill(run.pid, signal.SIGHUP)
    at = len(read_metrics(tmp_path / "run"))
    wait_for(logged(tmp_path / "run", at + 20))
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(60) == 143
    saved_by(tmp_path / "run", "SIGTERM")


@pytest.mark.promise(LOST)
def test_ctrl_c_in_a_pipeline_saves(started: Any, tmp_path: Path) -> None:
    """Ctrl-C also ends `tee`, so nothing reads the run's output while it saves."""
    run = started("2>&1 | tee", str(tmp_path / "log"), "; exit ${PIPESTATUS[0]}", stdout=subprocess.DEVNULL)
    wait_for(logged(tmp_path / "run", 5))
    os.killpg(run.pid, signal.SIGINT)
    wait_for(lambda: json.loads((tmp_path / "run" / "status.json").read_text())["state"] != "running")
    saved_by(tmp_path / "run", "SIGINT")


@pytest.mark.promise(LOST)
def test_a_pipe_that_nobody_reads(started: Any, tmp_path: Path) -> None:
    run = started("| head -n 3; exit ${PIPESTATUS[0]}", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert run.wait(60) == 141
    saved_by(tmp_path / "run", "SIGPIPE")


@pytest.mark.promise(LOST)
@pytest.mark.parametrize("stream", ["> /dev/full", "2> /dev/full", "> /dev/full 2>&1", ">&- 2>&-", "2> >(exec true)"])
def test_words_that_go_nowhere(stream: str, started: Any, tmp_path: Path) -> None:
    run = started(stream, before="exec", stdout=subprocess.DEVNULL)
    wait_for(logged(tmp_path / "run", 5))
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(60) == 143
    saved_by(tmp_path / "run", "SIGTERM")


@pytest.mark.promise(LOST)
def test_an_output_in_ascii(shards: Path, tmp_path: Path) -> None:
    values = pretrain_values(shards, tmp_path / "run", **{"optim.steps": 1, "optim.max_batch_per_device": 8})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = command("pretrain", tmp_path / "r.yaml", environment=ascii_only)
    assert done.returncode == 0, done.stderr
    assert "1 steps of 16 images (2 micro-batches \\xd7 8)" in done.stdout
