"""Start the processes of a run on this machine, as torchrun does."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence

import psutil
import torch

from mpp.errors import UserError
from mpp.parallel.children import watch_parent
from mpp.parallel.devices import cores
from mpp.parallel.signals import ending_signals

LAUNCHER = "MPP_LAUNCHER_PID"
"""Variable that tells the processes the pid of their launcher."""
SAVE_WITHIN_S = 300
"""Seconds that processes have to finish a step and save, after a signal and before they are killed (a guess)."""


def launch(words: Sequence[str], *, processes: int, device: str) -> int:
    """Run `mpp` in several processes on this machine, one for each device, and wait for them.

    Signals are passed on. If a process fails, the others are ended.

    Args:
        words: Words of the command after `mpp`.
        processes: Number of processes.
        device: Value of the recipe's key `device`.

    Returns:
        Exit code: 0 if all processes finished, 128 + number after a signal, else that of the first process that failed.

    Raises:
        UserError: If the machine has fewer devices.
    """
    _check_count(processes, device)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torch sets one thread for each process; on CPUs the cores are divided instead.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes) if device == "cpu" else 1))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_WITHIN_S))
    logging.disable(logging.ERROR)  # the processes report what is wrong; the launcher would repeat it in twenty lines
    os.environ[LAUNCHER] = str(os.getpid())
    logs = tempfile.mkdtemp()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"mpp-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        signals_to_handle=",".join(s.name for s in (*ending_signals(), signal.SIGQUIT)),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "mpp", *words)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode  # a process that a signal killed
    finally:
        for child in psutil.Process().children(recursive=True):  # after a third Ctrl-C torch leaves them behind
            child.kill()
        shutil.rmtree(logs, ignore_errors=True)
    return 0


def stop_with_launcher() -> None:
    """Let this process save and stop if `launch` started it and the launcher is gone."""
    if launcher := os.environ.get(LAUNCHER):
        watch_parent(int(launcher), lambda: os.kill(os.getpid(), signal.SIGTERM))


def _check_count(processes: int, device: str) -> None:
    if device == "mps":
        raise UserError(f"devices: {processes}: machines with device=mps have one; leave devices out")
    if device == "cpu":
        if processes > cores():
            raise UserError(f"devices: {processes}: this machine has {cores()} CPU cores; give at most as many")
        return
    there = torch.cuda.device_count()
    if there == 0:
        raise UserError(
            f"devices: {processes}: no CUDA device was found here (`mpp doctor` says why); device=cpu starts "
            f"{processes} processes on the CPU"
        )
    if processes > there:
        raise UserError(f"devices: {processes}: this machine has {there}; give at most as many")
