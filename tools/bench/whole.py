"""Time whole training commands: until the first step is done, the speed after it, and the memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from memory import peak_mib
from timing import Failed

PYTHONPATH = str(Path(__file__).resolve().parents[2])


class Whole(NamedTuple):
    """The figures of one run of a command."""

    first_step_s: float
    images_per_s: float
    """Images per second from the end of the first step to the end of the last."""
    peak_mib: float
    """Peak memory of the process, without the processes that read for it."""


class Command(NamedTuple):
    """A training command, as `words(steps, out)`.

    If a line of its output begins with "step N", step N is done.
    """

    name: str
    words: Callable[[int, Path], Sequence[str]]
    metrics: bool
    """Whether its steps are lines of OUT/metrics.jsonl instead of its output."""


def run(command: Command, *, steps: int, batch: int, out: Path) -> Whole:
    """Run a command and measure it.

    Raises:
        Failed: If the command ends with an error. The message has its last words.
    """
    shutil.rmtree(out, ignore_errors=True)
    ends: list[float] = []
    began = time.monotonic()
    process = subprocess.Popen(
        command.words(steps, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    said: list[str] = []

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.strip())
            if line.startswith("step ") and not command.metrics:
                ends.append(time.monotonic())

    listener = threading.Thread(target=listen)
    listener.start()
    metrics = out / "metrics.jsonl"
    peak = 0.0
    while listener.is_alive():
        if command.metrics and len(ends) < steps:
            lines = metrics.read_text().count("\n") if metrics.exists() else 0
            ends += [time.monotonic()] * (lines - len(ends))
        peak = max(peak, peak_mib(process.pid))
        time.sleep(0.02)
    process.wait()
    if process.returncode or len(ends) != steps:
        own = [line for line in said if line.startswith(("mpp:", "process "))]  # torchrun prints more after them
        raise Failed(f"{command.name}: {(own or said or ['no word'])[-1]}")
    rate = (steps - 1) * batch / (ends[-1] - ends[0])
    return Whole(ends[0] - began, rate, peak)


def ours(pictures: str, workers: int, *, processes: int = 0, **changes: object) -> Command:
    """Return the command of `mpp pretrain`, which ends with a checkpoint and a verified export.

    Args:
        pictures: Prefix of the shards' folder.
        workers: Number of dataloader workers.
        processes: Number of processes under torchrun, with one thread each if there are several. 0 means no torchrun.
        **changes: Recipe keys and their values.
    """

    def words(steps: int, out: Path) -> list[str]:
        keys = {
            "data.shards": f"{pictures}-shards", "data.workers": workers, "data.held_out": 8, "out": out,
            "optim.steps": steps, "optim.epochs": "null", "optim.warmup_epochs": 0, "log_every_steps": 1,
            "checkpoint_every_steps": 10**6, "skill_every_steps": 10**6, "reconstruct_images": 0, **changes,
        }  # fmt: skip
        recipe = Path(PYTHONPATH) / "recipes" / "pretrain" / "vit_small.yaml"
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes else []
        words = [*launcher, "-m", "mpp", "pretrain", str(recipe)]
        return [sys.executable, *words, *(f"{k}={v}" for k, v in keys.items())]

    return Command("mpp", words, metrics=True)


def peer(python: str, model: str, loader: str, size: str, pictures: str, workers: int) -> Command:
    script = str(Path(__file__).parent / "peers.py")

    def words(steps: int, out: Path) -> list[str]:
        return [python, script, model, loader, size, pictures, str(steps), str(workers)]

    return Command(f"{model}, {loader}", words, metrics=False)
