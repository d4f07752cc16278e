"""Training commands, whole: how long until the first step is done, how fast after it, how much memory."""

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
    """One run of a command."""

    first_step_s: float
    images_per_s: float
    """From the end of the first step to the end of the last."""
    peak_mib: float
    """Of the process, without those that read for it."""


class Command(NamedTuple):
    """words(steps, out) is the command. A line of its output that begins with "step N" says that step N is done."""

    name: str
    words: Callable[[int, Path], Sequence[str]]
    metrics: bool
    """Its steps are lines of OUT/metrics.jsonl, not of its output."""


def run(command: Command, *, steps: int, batch: int, out: Path) -> Whole:
    """Failed, with its last words, where it ends with an error."""
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
        own = [line for line in said if line.startswith(("mpp:", "process "))]  # torchrun says more after them
        raise Failed(f"{command.name}: {(own or said or ['no word'])[-1]}")
    rate = (steps - 1) * batch / (ends[-1] - ends[0])
    return Whole(ends[0] - began, rate, peak)


def ours(pictures: str, workers: int, *, processes: int = 0, **changes: object) -> Command:
    """`mpp pretrain`, with the checkpoint and the verified export at its end.

    processes: started by torchrun, several of them with one thread each; 0: without it.
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
