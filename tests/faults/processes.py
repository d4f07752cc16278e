"""Runs of `mpp` as real processes, several ranks over gloo, that a test may kill. What they leave can be compared."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mpp.runs.records import read_metrics
from tests.conftest import ROOT, pretrain_values
from tests.line_server import LineServer

WAIT_S = 120.0
JOBS = ["pretrain", "finetune"]


class Nursery:
    """Client of the process in nursery.py."""

    def __init__(self) -> None:
        plain = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "CUDA_VISIBLE_DEVICES": ""}
        program = [sys.executable, "-m", "tests.faults.nursery"]
        self._server = LineServer(program, cwd=ROOT, start_new_session=True, env={**os.environ, **plain})
        self._server.read()  # it is ready

    def ask(self, **request: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._server.ask(request)
        return found

    def close(self) -> None:
        self._server.close()

    def start(
        self,
        *words: str | Path,
        log: Path,
        world: int = 1,
        env: dict[str, str] | None = None,
        fault: dict[str, Any] | None = None,
        bound_by_modes: bool = False,
        record: Path | None = None,
        file_bytes: int | None = None,
    ) -> Job:
        """Start `mpp WORDS`.

        Args:
            *words: Command line after `mpp`.
            log: File for the output of all ranks.
            world: Number of ranks.
            env: Additional environment variables.
            fault: Fault to inject, see mpp/parallel/faults.py.
            bound_by_modes: Whether to run as a user who is not root, bound by the modes of files.
            record: File that gets a line for each sample of pretraining.
            file_bytes: Largest size of a file in bytes. None means no limit.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        shared = dict(env or {})
        if fault:
            pids = log.with_name(log.name + ".pids")
            pids.mkdir(exist_ok=True)
            shared |= {"MPP_FAULT": json.dumps(fault), "MPP_FAULT_PIDS": str(pids)}
        pids_of = []
        for own in launched(world):
            answer = self.ask(
                words=[str(w) for w in words],
                env={**shared, **own},
                log=str(log),
                bound_by_modes=bound_by_modes,
                file_bytes=file_bytes,
                record=str(record) if record else None,
            )
            pids_of.append(answer["pid"])
        return Job(self, pids_of, log)


@dataclass
class Job:
    """The ranks of a command."""

    nursery: Nursery
    pids: list[int]
    log: Path

    def codes(self) -> list[int | None]:
        """Return the exit status of each rank: negative for a signal, None while it runs."""
        return [self.nursery.ask(pid=pid)["code"] for pid in self.pids]

    def wait(self, seconds: float = WAIT_S) -> list[int]:
        """Wait until all ranks have ended, and return their exit codes.

        Raises:
            AssertionError: If it takes longer. The ranks have been killed.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = self.codes()
            if None not in found:
                return [code for code in found if code is not None]
            time.sleep(0.02)
        codes = self.codes()
        for pid, code in zip(self.pids, codes, strict=True):
            if code is None:
                os.kill(pid, signal.SIGUSR2)
        time.sleep(0.5)
        self.kill()
        raise AssertionError(f"still running after {seconds:g} s: {codes}\n{self.said()}")

    def end_with_the_first(self, grace_s: float = 15.0) -> list[int]:
        """Wait as a launcher does: once a rank has failed, kill the others unless they end by themselves."""
        while not any(self.codes()) and None in self.codes():
            time.sleep(0.01)
        deadline = time.monotonic() + grace_s
        while None in self.codes() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.kill()
        return self.wait()

    def kill(self) -> None:
        for pid, code in zip(self.pids, self.codes(), strict=True):
            if code is None:
                os.kill(pid, signal.SIGKILL)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, true: Callable[[], bool], seconds: float = WAIT_S) -> None:
        """Wait for a condition while the ranks run.

        Raises:
            AssertionError: If the ranks end first, or it takes longer.
        """
        deadline = time.monotonic() + seconds
        while not true():
            assert None in self.codes() or true(), f"ended first: {self.codes()}\n{self.said()}"
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def ends_well(self) -> None:
        codes = self.wait()
        assert set(codes) == {0}, f"{codes}\n{self.said()}"


_ports = itertools.count(20000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))


def free_port() -> int:
    """Return a port without a listener, from this worker's own thousand, below the ports that the system hands out."""
    for port in _ports:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError


def launched(world: int) -> list[dict[str, str]]:
    """Return the environment variables that a launcher sets for each process."""
    if world == 1:
        return [{}]
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def children(pid: int) -> list[int]:
    """Return the child processes that still exist."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def records_of(job: str, out: Path) -> Path:
    """Return the folder that has metrics.jsonl and checkpoints: that of the run, or of its only trial."""
    return out if job == "pretrain" else out / "scratch-seed0"


def status(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "status.json").read_text())
    return found


def steps_logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@dataclass(frozen=True)
class Left:
    """What a run leaves that must be the same, killed or not."""

    losses: dict[str, list[tuple[int, str]]]
    """(step, loss as float.hex) of each metrics.jsonl."""
    weights: dict[str, str]
    """sha256 of each exported model."""


def left(out: Path) -> Left:
    records = sorted(out.rglob("metrics.jsonl"))
    models = [p for p in sorted(out.rglob("encoder/*.safetensors")) if p.name != "reference.safetensors"]
    return Left(
        {
            str(p.relative_to(out)): [(m["step"], float(m["loss"]).hex()) for m in read_metrics(p.parent)]
            for p in records
        },
        {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in models},
    )


def pretraining(shards: Path, path: Path, out: Path, **changes: Any) -> Path:
    """Write a recipe of 12 steps with accumulation, a moving teacher as well as pixels, and drop path."""
    rich: dict[str, Any] = {
        "target": {"name": "ema_teacher", "layers": 2, "decay": 0.9},
        "extra_targets": [{"target": "pixels", "head": "mlp"}],
        "encoder.args.drop_path_rate": 0.2,
        "optim.steps": 12,
        "optim.max_batch_per_device": 4,
        "checkpoint_every_steps": 3,
        "skill_every_steps": 6,
        "reconstruct_images": 0,
    }
    return written(path, pretrain_values(shards, out, **{**rich, **changes}))


def finetuning(shards: Path, path: Path, out: Path, **changes: Any) -> Path:
    """Write a recipe with accumulation, averaged weights, early stopping, mixup, erasing and drop path."""
    from mpp.recipe.overrides import apply_overrides

    values: dict[str, Any] = {
        "job": "finetune",
        "out": str(out),
        "encoder": "scratch",
        "architecture": {
            "name": "vit_tiny_patch16_224",
            "args": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
        },
        "seeds": [0],
        "data": {
            "train": [str(shards / f"shard-{i:06d}.tar") for i in (1, 2)], "val": str(shards / "shard-000000.tar"),
            "image_size": 16, "workers": 0, "erase": 0.3,
        },
        "optim": {"base_lr": 3e-2, "steps": 12, "global_batch_size": 16, "max_batch_per_device": 4, "warmup_steps": 3},
        "mixup": 0.8,
        "drop_path_rate": 0.2,
        "ema_decay": 0.9,
        "early_stop": {"fraction": 0.3, "every_steps": 4, "patience": 9},
        "log_every_steps": 1,
        "checkpoint_every_steps": 3,
    }  # fmt: skip
    apply_overrides(values, {}, changes)
    return written(path, values)


def written(path: Path, values: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
