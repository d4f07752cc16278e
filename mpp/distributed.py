"""Processes and devices: the only user of Accelerate besides the two loops."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator as Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, parse_flag_from_env

from mpp import faults, streams
from mpp.errors import MppWarning, ToldElsewhere, UserError, how_to_get, one_line

PROJECT = "mpp"
"""Of runs, in trackers."""
HANG_TIMEOUT_S = 1800
"""What processes wait for each other at most, where a recipe does not say (a guess)."""
TF32_FROM = (8, 0)
"""Compute capability."""
SPARE_LOAD = 0.75
"""Of one core, that other work may take before it is spoken of (a guess)."""
WAIT_TOLD_S = 10.0
"""Processes find each other in less, most often; after so long a line says what is waited for (a guess)."""
SAME_PRESS_S = 1.0
"""A second SIGINT within so many seconds is the same Ctrl-C: torchrun passes on what the terminal sent to all."""

COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
"""Variables of launchers that hold whole numbers."""
LAUNCHERS = (*COUNTS, "MASTER_ADDR", "ACCELERATE_", "OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_", "FORK_LAUNCHED")
"""How names of variables begin that Accelerate reads."""

T = TypeVar("T")


def start(precision: str, trackers: Sequence[str] = (), hang_timeout_s: float = HANG_TIMEOUT_S) -> Accelerator:
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
        if _is_set(f"ACCELERATE_USE_{engine}"):
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


def _is_set(variable: str) -> bool:
    """Whether a launcher's switch is on. UserError if it is neither on nor off."""
    try:
        return bool(parse_flag_from_env(variable))
    except ValueError as error:
        raise UserError(f"{variable}: '{os.environ[variable]}' in the environment; must be true or false") from error


def check_launch(environment: Mapping[str, str]) -> None:
    """Check the variables by which a launcher says which process of how many this one is.

    Raises:
        UserError: One is no number of its kind, or some are missing: the run would wait for processes that never come.
    """
    numbers: dict[str, int] = {}
    for name in COUNTS:
        value = environment.get(name)
        if value is None:
            continue
        if not re.fullmatch(r"-?[0-9]{1,9}", value):
            raise UserError(f"{name}: '{value}' in the environment, not a whole number; start by torchrun, or unset it")
        numbers[name] = int(value)
    if "LOCAL_RANK" not in numbers and numbers.get("WORLD_SIZE", 1) <= 1:
        return  # one process, whatever else is there
    world, rank = numbers.get("WORLD_SIZE", 1), numbers.get("RANK", 0)
    missing = [name for name in ("RANK", "MASTER_ADDR") if not environment.get(name)]
    missing += ["WORLD_SIZE"] if rank > 0 and "WORLD_SIZE" not in numbers else []
    if missing:
        there = ", ".join(name for name in COUNTS if name in numbers)
        raise UserError(
            f"{there} {'are' if ', ' in there else 'is'} in the environment, but not {', '.join(missing)}; start the "
            f"run by torchrun, or unset {there}"
        )
    least = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    most = {"RANK": world - 1, "MASTER_PORT": 65535}
    for name, number in sorted(numbers.items(), reverse=True):  # WORLD_SIZE first: RANK is below it
        if not least.get(name, 0) <= number <= most.get(name, number):
            end = f" and at most {most[name]}" if name in most else ""
            raise UserError(f"{name}: {number} in the environment; must be at least {least.get(name, 0)}{end}")


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies matrices faster in bf16 than in fp32: AVX512-BF16 or AMX, where torch says so.

    A step then takes half the time, from a ViT 192 wide on; 0.6 of it at 128 (recipes/LOG.md).
    """
    found = (
        getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(ask() for ask in found)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_in_use(accelerator: Accelerator | None = None) -> str:
    """A line if other work runs on the cores that torch's threads would take; "" if there is room for them."""
    if accelerator is not None and (accelerator.device.type != "cpu" or accelerator.num_processes > 1):
        return ""  # a device does the work; or the load is that of the other processes
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    if threads == 1 or load + threads <= cores() + SPARE_LOAD:
        return ""
    return f"other work takes {load:.1f} of {cores()} cores, so a run is slower than it could be"


def multiply_in_tf32(rounded: bool) -> None:
    """Products and convolutions of fp32 numbers on CUDA devices, of this process, from now on.

    torch's own default has convolutions rounded and products not.
    """
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    torch.backends.cudnn.allow_tf32 = rounded


def write_attention_out(written_out: bool) -> None:
    """Attention by two products and a softmax, or by torch's fused kernel; of this process, from now on.

    Written out for bf16 on CPUs, where the fused kernel is slow backwards: a step takes 0.65 to 0.8 of the time
    (recipes/LOG.md), and keeps a matrix of tokens × tokens for each head.
    """
    torch.backends.cuda.enable_flash_sdp(not written_out)  # CUDA's by its name, but CPUs heed it
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(written_out)


def compile_forward(model: torch.nn.Module, device: torch.device) -> None:
    """`torch.compile`, in place: names and state stay as they are. UserError where this machine cannot."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a Python that torch does not know yet
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        said = f"torch cannot compile on this machine ({first.strip()}); allowed here: false"
        raise UserError(f"compile: {said}") from error
    model.compile()


class Trackers:
    """TensorBoard, Weights & Biases or Trackio, through Accelerate; on the main process alone.

    names: of recipes. out: the run folder, in which their files lie. settings: the recipe's values by dotted key.
    resumed_at: TensorBoard forgets what it had of later steps. UserError where one cannot begin.
    """

    def __init__(
        self, accelerator: Accelerator, names: Sequence[str], out: Path, settings: dict[str, Any], resumed_at: int
    ) -> None:
        self._found: list[Any] = []
        if not names or not accelerator.is_main_process:
            return
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": resumed_at + 1},
            "wandb": {
                "dir": str(out),
                "name": f"{out.parent.name}/{out.name}",
                "id": _tracked_as(out),
                "resume": "allow",
            },
            "trackio": {"name": f"{out.name}-{_tracked_as(out)}", "resume": "allow"},
        }
        try:
            for name in names:
                kind = LOGGER_TYPE_TO_CLASS[name]
                where = {"logging_dir": str(out)} if kind.requires_logging_directory else {}
                tracker = kind(PROJECT, **where, **options[name])
                tracker.start()
                tracker.store_init_configuration(plain)
                self._found.append(tracker)
        except Exception as error:  # theirs: no login, no network, a folder that cannot be written
            raise UserError(f"trackers: {name}: {type(error).__name__}: {one_line(error)}") from error

    def log(self, record: dict[str, Any]) -> None:
        """Numbers of one line of the metrics; `step` is in it."""
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v) and k != "step"}
        for tracker in list(self._found):
            try:
                tracker.log(numbers, step=record["step"])
            except Exception as error:  # theirs; a run does not end for it
                self._found.remove(tracker)
                warnings.warn(f"trackers: {tracker.name} gets no more: {one_line(error)}", MppWarning, stacklevel=2)

    def close(self) -> None:
        for tracker in self._found:
            tracker.finish()
        self._found = []


def _tracked_as(out: Path) -> str:
    """The run's name for trackers, the same when it is resumed."""
    path = out / "tracked-as"
    try:
        return path.read_text().strip()
    except OSError:
        name = uuid.uuid4().hex[:12]
        path.write_text(f"{name}\n")
        return name


def accumulation(global_batch: int, world: int, max_batch_per_device: int) -> int:
    """Micro-batches of one step on each process: the fewest that fit. UserError where they cannot be equal."""
    if global_batch % world:
        raise UserError(
            f"optim.global_batch_size: {global_batch} cannot be shared by {world} processes; "
            f"allowed are multiples of {world}"
        )
    share = global_batch // world
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= max_batch_per_device)


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.by: str | None = None
        """The signal's name."""
        self.at = -math.inf
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.by is not None

    def listen(self) -> None:
        """From now on the signals of `ending_signals` set the request; a second SIGINT stops at once.

        Outside the main thread (a notebook's, a server's) signals are left as they are.
        """
        with suppress(ValueError):  # not the main thread
            for number in ending_signals():
                self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.by == "SIGINT":
            if now - self.at < SAME_PRESS_S:
                return
            raise KeyboardInterrupt
        self.at = now
        again = " (Ctrl-C again stops at once)" if number == signal.SIGINT else ""
        self._stop(signal.Signals(number).name, again)

    def _stop(self, by: str, note: str = "") -> None:
        """Set the request. The words go past Python's streams, which may be in the middle of a line."""
        if by == "SIGPIPE" and self.by:
            return
        self.by = by
        with suppress(OSError):
            os.write(2, f"{by}: finishing the step, then saving{note}\n".encode())

    def of_all(self, accelerator: Accelerator) -> str:
        """The name of the signal that some process got, the same on all of them, which call this together."""
        return next((by for by in gathered(accelerator, [self.by]) if by), signal.SIGTERM.name)

    def __enter__(self) -> StopRequest:
        streams.on_broken_pipe = lambda: self._stop("SIGPIPE")
        return self

    def __exit__(self, *_: object) -> None:
        """Signals are what they were. It is the last to leave: a launcher that ends the processes of a run in which one
        has died must not end them before they have said so.
        """
        streams.on_broken_pipe = None
        for number, handler in self._before.items():
            signal.signal(number, handler)


def ending_signals() -> list[signal.Signals]:
    """Signals by which a run is asked to end. A closed terminal sends SIGHUP, which `nohup` has ignored."""
    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    return [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *hangup]


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let the signals of `ending_signals` end what runs inside at once: SystemExit(128 + number), or KeyboardInterrupt.

    They also do if a shell started the process in the background, which leaves SIGINT ignored. Outside the main thread
    signals are left as they are.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    before: dict[int, Any] = {}
    with suppress(ValueError):  # not the main thread
        for number in ending_signals():
            before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


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


def gathered(accelerator: Accelerator, values: list[T]) -> list[T]:
    """Of every process, in their order, on every process."""
    found: list[T] = gather_object(values) if accelerator.num_processes > 1 else values
    return found


class Exchange:
    """A step's numbers from all processes, on their way to the host, which waits for them only when it reads them.

    own: (K,) of this process and `counts`, which the host knows: both are summed, in float64, so counts stay exact.
    alike: () of the device, the same in every process.
    """

    def __init__(self, accelerator: Accelerator, own: torch.Tensor, counts: list[float], alike: torch.Tensor) -> None:
        device = accelerator.device
        known = torch.tensor(counts, dtype=torch.float64)
        if device.type == "cuda":  # from pageable memory a copy waits for the device
            known = known.pin_memory()
        values = torch.cat([own.double(), known.to(device, non_blocking=True)])
        if accelerator.num_processes > 1:
            values = accelerator.reduce(values, "sum")
        self.summed = values[: len(own)]
        """(K,) over all processes, on the device."""
        values = torch.cat([values, alike.double().view(1)])
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=device.type == "cuda")
        self._host.copy_(values, non_blocking=True)
        self._arrived = torch.get_device_module(device).Event()
        self._arrived.record()

    def read(self) -> list[float]:
        """Sums of `own`, sums of `counts`, and `alike`."""
        self._arrived.synchronize()
        return self._host.tolist()


def total(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Sums over all processes of a few numbers. float64: counts stay exact."""
    if accelerator.num_processes == 1:
        return values
    own = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    summed: torch.Tensor = accelerator.reduce(own, "sum")
    return summed.tolist()
