"""Processes and devices: the only user of Accelerate besides the two loops."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator as Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from mpp.errors import ToldElsewhere, UserError, how_to_get, one_line
from mpp.parallel import faults
from mpp.parallel.devices import TF32_FROM, multiply_in_tf32, write_attention_out
from mpp.parallel.launch import LAUNCHERS, check_launch, is_set

HANG_TIMEOUT_S = 1800
"""What processes wait for each other at most, where a recipe does not say (a guess)."""
WAIT_TOLD_S = 10.0
"""Processes find each other in less, most often; after so long a line says what is waited for (a guess)."""
T = TypeVar("T")


def start_accelerator(
    precision: str, trackers: Sequence[str] = (), hang_timeout_s: float = HANG_TIMEOUT_S
) -> Accelerator:
    """An Accelerator for the processes that torchrun or `accelerate launch` made, or for this one alone.

    precision: "fp32", "tf32", "bf16", or "auto": bf16 where a CUDA device has it, fp32 on CPUs: bf16 is 3.2 times
    slower on those without instructions for it; the others (`cpu_has_bf16`) would take half the time. trackers: those
    that the run will want. hang_timeout_s: an exchange that waits longer fails; a little more, so that `liveness` is
    the first to say so. UserError where a precision is asked of a device that has none, a tracker is not installed, or
    the other processes do not come.
    """
    faults.announce()
    check_launch(os.environ)
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; {how_to_get(name)}")
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        # on CPUs they would do nothing, on GPUs write one process's part as all, or take the update out of the loop
        if is_set(f"ACCELERATE_USE_{engine}"):
            said = f"allowed: a launch without --use_{engine.lower()} (distributed_type: MULTI_GPU)"
            raise UserError(f"accelerate's {engine}: {said}; `mpp pretrain` has fsdp=true")
    cuda = torch.cuda.is_available()
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported():
        raise UserError(f"precision: {torch.cuda.get_device_name()} has no bf16; allowed: auto, fp32")
    if precision == "tf32" and not (cuda and torch.cuda.get_device_capability() >= TF32_FROM):
        raise UserError("precision: tf32 is for CUDA devices from Ampere on; allowed here: auto, fp32, bf16")
    if cuda:
        multiply_in_tf32(precision == "tf32")
    bf16 = precision == "bf16" or (precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    given = sorted(n for n in os.environ if n.startswith(LAUNCHERS))
    # An earlier run of this process may have had another precision; the process group stays.
    AcceleratorState._reset_state()
    rank, world, host, port = (os.environ.get(n) for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    waiting = threading.Timer(
        WAIT_TOLD_S, lambda: print(f"waiting for the other processes at {host}:{port}", flush=True)
    )
    waiting.daemon = True
    waiting.start()
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if bf16 else "no",
            dynamo_backend="no",  # compile=true is the recipe's to say, not a launcher's configuration's
            cpu=not cuda,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=hang_timeout_s + 60))],
        )
    except torch.distributed.DistError as error:
        said = f"process {rank} of {world} did not find the others at {host}:{port}: {one_line(error)}"
        raise UserError(said) from error
    except ValueError as error:  # Accelerate's and torch's, of variables that are half set or garbage
        if not given:
            raise
        raise UserError(
            f"the launcher's environment cannot be used: {one_line(error)}. Start the run by torchrun or "
            f"`accelerate launch`, or unset {', '.join(given)}"
        ) from error
    finally:
        waiting.cancel()
    write_attention_out(bf16 and not cuda)
    return accelerator


def on_main(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """What `act` returns on the main process, on every process: the others wait for it.

    UserError on every process where it raises one there, told by the main process alone.
    """
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = act()
        except UserError as error:
            if accelerator.num_processes == 1:
                raise
            found[1] = error
    if accelerator.num_processes > 1:
        failed = found[1]
        broadcast_object_list(found)
        if failed is not None:
            raise failed
        if found[1] is not None:
            raise ToldElsewhere(str(found[1]))
    result: T = found[0]
    return result


def ranks_here(rank: int, world: int) -> range:
    """Of the processes of this machine, as launchers number them; of all where the launcher does not say."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return range(rank // count * count, min((rank // count + 1) * count, world))


def gather_objects(accelerator: Accelerator, values: list[T]) -> list[T]:
    """Of every process, in their order, on every process."""
    found: list[T] = gather_object(values) if accelerator.num_processes > 1 else values
    return found


def sum_over_processes(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Sums over all processes of a few numbers. float64: counts stay exact."""
    if accelerator.num_processes == 1:
        return values
    own = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    summed: torch.Tensor = accelerator.reduce(own, "sum")
    return summed.tolist()
