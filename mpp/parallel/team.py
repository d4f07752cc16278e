"""The processes of a run and their devices. Only `Team` uses Accelerate."""

from __future__ import annotations

import importlib.util
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast, broadcast_object_list, gather_object
from torch import Tensor, nn

from mpp.errors import ToldElsewhere, UserError, how_to_get, one_line
from mpp.parallel import faults
from mpp.parallel.devices import TF32_FROM, choose_device, multiply_in_tf32, write_attention_out
from mpp.parallel.launch import LAUNCHERS, check_launch, is_set
from mpp.parallel.sharding import whole_value

HANG_TIMEOUT_S = 1800
"""Most seconds that processes wait for each other if a recipe does not set it (a guess)."""
WAIT_TOLD_S = 10.0
"""Seconds after which a line reports that this process waits for the others. Most often they are there sooner (a
guess)."""
T = TypeVar("T")


class Team:
    """The processes of a run, as seen from this process, and the device of this process."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        """Number of processes."""
        self.is_main: bool = accelerator.is_main_process
        self.device: torch.device = accelerator.device

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context in which operations run in the run's precision."""
        context: AbstractContextManager[object] = self._accelerator.autocast()
        return context

    # ---- what all processes agree on

    def on_main(self, act: Callable[[], T]) -> T:
        """Return on every process what `act` returns on the main process. The others wait for it.

        Raises:
            UserError: If `act` raised it; on every process. Only the main process reports it.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = act()
            except UserError as error:
                if self.world == 1:
                    raise
                outcome[1] = error
        if self.world > 1:
            failed = outcome[1]
            broadcast_object_list(outcome)
            if failed is not None:
                raise failed
            if outcome[1] is not None:
                raise ToldElsewhere(str(outcome[1]))
        result: T = outcome[0]
        return result

    def gather(self, values: list[T]) -> list[T]:
        """Return the values of every process, in the order of the processes."""
        gathered: list[T] = gather_object(values) if self.world > 1 else values
        return gathered

    def sum(self, values: list[float]) -> list[float]:
        """Return sums over all processes, in float64, so that counts stay exact."""
        if self.world == 1:
            return values
        summands = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.sum_tensor(summands).tolist()

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Return the sum over all processes. It stays on the device."""
        if self.world == 1:
            return values
        summed: Tensor = self._accelerator.reduce(values, "sum")
        return summed

    def copy_from_main(self, values: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the main process."""
        for value in values:
            value.copy_(broadcast(value))

    def wait(self) -> None:
        """Wait until every process has reached this call."""
        self._accelerator.wait_for_everyone()

    def ranks_here(self) -> range:
        """Return the ranks on this machine; all ranks if the launcher does not set their number."""
        return ranks_here(self.rank, self.world)

    # ---- training

    def wrap_model(self, model: nn.Module, *, sharded: bool = False) -> nn.Module:
        """Return the model as the loop calls it: in autocast, with gradients exchanged.

        A sharded model exchanges gradients by itself. It is prepared in evaluation mode, so that Accelerate does not
        wrap it a second time.
        """
        wrapped: nn.Module = self._accelerator.prepare_model(model, evaluation_mode=sharded)
        return wrapped

    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return the optimizer as the loop calls it."""
        return self._accelerator.prepare_optimizer(optimizer)

    def accumulate(self, wrapped: nn.Module, *, exchange: bool) -> AbstractContextManager[object]:
        """Return a context for one micro-batch.

        Args:
            wrapped: The model of `wrap_model`.
            exchange: Whether the backward pass exchanges gradients.
        """
        return nullcontext() if exchange else self._accelerator.no_sync(wrapped)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters."""
        self._accelerator.backward(loss)

    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale gradients down to at most `max_norm`. None means no limit.

        Returns:
            () on the device: norm of the gradients before scaling.
        """
        return whole_value(self._accelerator.clip_grad_norm_(parameters, max_norm or math.inf))


def start_team(
    precision: str,
    trackers: Sequence[str] = (),
    hang_timeout_s: float = HANG_TIMEOUT_S,
    *,
    device: str = "auto",
) -> Team:
    """Join the processes that torchrun or `accelerate launch` started, or make a team of only this process.

    Args:
        precision: "fp32", "tf32", "bf16", or "auto": bf16 on CUDA devices that support it, else fp32. With bf16, CPUs
            without instructions for it take 3.2 times as long; the others (`cpu_has_bf16`) half the time.
        trackers: Names of the trackers that the run will use.
        hang_timeout_s: Seconds without progress after which `liveness` reports a hang. Exchanges between processes fail
            one minute later, so that `liveness` reports first.
        device: "auto": CUDA where there is a device, else the CPU; "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        UserError: If this machine does not have the device, the device lacks the precision, a tracker is not
            installed, or the launch cannot be used, for example because the other processes are not found.
    """
    faults.announce()
    check_launch(os.environ)
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; {how_to_get(name)}")
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        # On CPUs these engines would do nothing. On GPUs, one process's part would be saved as the whole, or the
        # engine would take over the update.
        if is_set(f"ACCELERATE_USE_{engine}"):
            reason = f"launch without --use_{engine.lower()} (distributed_type: MULTI_GPU)"
            raise UserError(f"accelerate's {engine}: {reason}; `mpp pretrain` has fsdp=true")
    kind = choose_device(device)
    cuda = kind == "cuda"
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported():
        raise UserError(f"precision: {torch.cuda.get_device_name()} has no bf16; use auto or fp32")
    if precision == "tf32" and not (cuda and torch.cuda.get_device_capability() >= TF32_FROM):
        raise UserError("precision: tf32 is for CUDA devices from Ampere on; use auto, fp32 or bf16 here")
    if cuda:
        multiply_in_tf32(precision == "tf32")
    bf16 = precision == "bf16" or (precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    given = sorted(n for n in os.environ if n.startswith(LAUNCHERS))
    # An earlier run of this process may have had another precision or device; a process group stays.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    rank, world, host, port = (os.environ.get(n) for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    waiting = threading.Timer(
        WAIT_TOLD_S, lambda: print(f"waiting for the other processes at {host}:{port}", flush=True)
    )
    waiting.daemon = True
    waiting.start()
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if bf16 else "no",
            dynamo_backend="no",  # the recipe's key `compile` decides, not the launcher's configuration
            cpu=kind == "cpu",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=hang_timeout_s + 60))],
        )
    except torch.distributed.DistError as error:
        reason = f"process {rank} of {world} did not find the others at {host}:{port}: {one_line(error)}"
        raise UserError(reason) from error
    except ValueError as error:  # from Accelerate or torch, if variables are incomplete or have invalid values
        if not given:
            raise
        raise UserError(
            f"the launcher's environment cannot be used: {one_line(error)}. Start the run by torchrun or "
            f"`accelerate launch`, or unset {', '.join(given)}"
        ) from error
    finally:
        waiting.cancel()
    write_attention_out(bf16 and not cuda)
    return Team(accelerator)


def ranks_here(rank: int, world: int) -> range:
    """Return the ranks on this machine, as launchers number them; all ranks if the launcher does not set a count."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return range(rank // count * count, min((rank // count + 1) * count, world))
