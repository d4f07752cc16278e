"""A run that is asked to stop saves after the step and reports it. Asked twice, it stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpp.runs.records import checkpoints_in
from tests.conftest import ROOT
from tests.faults.conftest import RECIPES, Bench
from tests.faults.processes import JOBS, Left, Nursery, children, left, records_of, status, steps_logged

LONG = {"optim.steps": 150, "checkpoint_every_steps": 10000}
SAVED = "SIGTERM, SIGINT or SIGHUP to any rank saves after the step; all exit with 143, 130 or 129"


@pytest.mark.promise(SAVED)
@pytest.mark.parametrize("which", [pytest.param([0], marks=pytest.mark.exhaustive), [1], [0, 1]])
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (signal.SIGINT, signal.SIGHUP))],
)
@pytest.mark.parametrize("job", JOBS)
def test_a_signal_saves(
    job: str,
    number: signal.Signals,
    which: list[int],
    nursery: Nursery,
    shards: Path,
    folder: Path,
    reference: Callable[..., Left],
) -> None:
    changes = {**LONG, **({"early_stop.every_steps": 150} if job == "finetune" else {})}
    path, out = RECIPES[job](shards, folder / "r.yaml", folder / "run", **changes), folder / "run"
    records = records_of(job, out)
    run = nursery.start(job, path, log=folder / "log", world=2)
    run.until(lambda: steps_logged(records) >= 5)
    at = steps_logged(records)
    for rank in which:
        os.kill(run.pids[rank], number)
    assert run.wait(30) == [128 + number] * 2, run.said()
    (saved,) = checkpoints_in(records / "checkpoints")
    step = int(saved.name[5:])
    assert step == steps_logged(records) == status(records)["step"] < at + 100
    why = number.name if 0 in which else "a signal to another process"
    for place in {out, records}:
        assert (status(place)["state"], status(place)["why"]) == ("stopped", why)
    nursery.start(job, path, "--resume", "auto", log=folder / "log", world=2).ends_well()
    assert left(out) == reference(job, 2, **changes)


@pytest.mark.promise("A second SIGINT stops at once without saving (exit code 130); the run can be resumed")
@pytest.mark.parametrize("job", JOBS)
def test_a_second_sigint_stops_at_once(
    job: str, nursery: Nursery, shards: Path, folder: Path, reference: Callable[..., Left]
) -> None:
    path, out = RECIPES[job](shards, folder / "r.yaml", folder / "run"), folder / "run"
    records = records_of(job, out)
    fault = {"point": "train.step_begins", "nth": 9, "do": "sleep", "seconds": 60}
    run = nursery.start(job, path, log=folder / "log", world=2, fault=fault)
    run.until(lambda: steps_logged(records) >= 8)
    began = time.monotonic()
    for pid in run.pids:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    for pid in run.pids:  # the same Ctrl-C, passed on by a launcher
        os.kill(pid, signal.SIGINT)
    time.sleep(1.0)
    assert run.codes() == [None, None], "both must still be in the step that they were asked to finish"
    for pid in run.pids:
        os.kill(pid, signal.SIGINT)
    codes = run.wait(20)
    assert codes[0] == 130, run.said()
    assert codes[1] in (130, 2), run.said()
    assert time.monotonic() - began < 20
    assert (status(records)["state"], status(records)["why"]) == ("stopped", "interrupted, without saving")
    assert checkpoints_in(records / "checkpoints")[0].name == "step-00000006"
    nursery.start(job, path, "--resume", "auto", log=folder / "log", world=2).ends_well()
    assert left(out) == reference(job, 2)


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "mpp", "pretrain"),
    "devices=2": ("mpp", "pretrain", "devices=2", "device=cpu"),
}
"""Module and its words that start two processes, by launcher. The recipe comes last."""


@contextlib.contextmanager
def under(launcher: str, path: Path, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Launch two processes that have trained for some steps. If the launcher still runs afterwards, kill it."""
    log = out.with_name("log")
    module, *words = LAUNCHERS[launcher]
    where = words.index("pretrain") + 1
    with open(log, "w") as lines:
        run = subprocess.Popen(
            [sys.executable, "-m", module, *words[:where], str(path), *words[where:]],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, stdout=lines, stderr=lines,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while steps_logged(out) < 5:
            assert run.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield run
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


@pytest.mark.promise("A signal to torchrun, or to mpp with devices=2, saves; resumed, the run is bit-equal")
@pytest.mark.parametrize(
    ("launcher", "number", "to_group", "code"),
    [
        ("torchrun", signal.SIGTERM, False, 1),  # torchrun's own code after a signal
        pytest.param("torchrun", signal.SIGHUP, False, 1, marks=pytest.mark.exhaustive),
        pytest.param("torchrun", signal.SIGINT, True, 1, marks=pytest.mark.exhaustive),
        pytest.param("devices=2", signal.SIGTERM, False, 143, marks=pytest.mark.exhaustive),
        pytest.param("devices=2", signal.SIGUSR1, False, 138, marks=pytest.mark.exhaustive),
        ("devices=2", signal.SIGINT, True, 130),
    ],
)
def test_under_a_launcher(launcher: str, number: signal.Signals, to_group: bool, code: int, bench: Bench) -> None:
    path, out = bench.recipe("pretrain", **LONG), bench.folder / "run"
    with under(launcher, path, out) as run:
        (os.killpg if to_group else os.kill)(run.pid, number)
        assert run.wait(30) == code, bench.log.read_text()
    assert status(out)["state"] == "stopped", bench.log.read_text()
    (saved,) = checkpoints_in(out / "checkpoints")
    assert status(out)["step"] == int(saved.name[5:])
    bench.goes_on("pretrain", path, **LONG)


@pytest.mark.promise("kill -9 of a launched rank is named by the other; resumed, the run is bit-equal")
@pytest.mark.parametrize(
    ("launcher", "victim", "codes"),
    [
        pytest.param("torchrun", 0, {1}, marks=pytest.mark.exhaustive),
        pytest.param("torchrun", 1, {1}, marks=pytest.mark.exhaustive),
        ("devices=2", 1, {137, 2}),  # of whichever ended first: the killed one, or the one that names it
    ],
)
def test_killed_under_a_launcher(launcher: str, victim: int, codes: set[int], bench: Bench) -> None:
    path, out = bench.recipe("pretrain", **{"optim.steps": 150}), bench.folder / "run"
    with under(launcher, path, out) as run:
        killed = next(
            pid for pid in children(run.pid) if f"\0RANK={victim}\0" in Path(f"/proc/{pid}/environ").read_text()
        )
        os.kill(killed, signal.SIGKILL)
        assert run.wait(60) in codes
    bench.count("kills", 1)
    assert f"process {victim} (pid {killed} on " in bench.log.read_text(), bench.log.read_text()
    assert status(out)["state"] == ("failed" if victim else "running"), "process 0 writes the status"
    bench.goes_on("pretrain", path, **{"optim.steps": 150})


@pytest.mark.promise("kill -9 of mpp with devices=2: its processes save and stop; resumed, the run is bit-equal")
def test_killed_launcher(bench: Bench) -> None:
    path, out = bench.recipe("pretrain", **LONG), bench.folder / "run"
    with under("devices=2", path, out) as run:
        ranks = children(run.pid)
        run.kill()
        bench.count("kills", 1)
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert time.monotonic() < deadline, bench.log.read_text()
            time.sleep(0.05)
    assert (status(out)["state"], status(out)["why"]) == ("stopped", "SIGTERM")
    bench.goes_on("pretrain", path, **LONG)
