"""Capabilities of a device: cores, bf16, TF32, attention kernels, compilation."""

from __future__ import annotations

import os

import torch

from mpp.errors import UserError

TF32_FROM = (8, 0)
"""Least compute capability of CUDA devices with TF32."""
SPARE_LOAD = 0.75
"""Load of other work that is not reported, in cores (a guess)."""


def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies matrices faster in bf16 than in fp32.

    torch must report AVX512-BF16 or AMX. A step in bf16 then takes half the time for ViTs of width 192 or more, and 0.6
    of the time at width 128 (recipes/LOG.md).
    """
    questions = (
        getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(ask() for ask in questions)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_in_use() -> str:
    """Return a warning if other work runs on the cores that torch's threads would use; "" if enough cores are free."""
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    if threads == 1 or load + threads <= cores() + SPARE_LOAD:
        return ""
    return f"other work takes {load:.1f} of {cores()} cores, so a run is slower than it could be"


def advise_on_cpu(precision: str, processes: int) -> list[str]:
    """Return advice that would make a run on this machine's CPU faster.

    Args:
        precision: Value of the recipe's key `precision`.
        processes: Number of processes of the run. If there are several, the load of the cores is not considered.
    """
    advice = []
    if precision == "auto" and cpu_has_bf16():
        advice.append("this CPU has instructions for bf16: precision=bf16 may take half the time")
    if precision == "bf16" and not cpu_has_bf16():
        advice.append("this CPU has no instructions for bf16: precision=fp32 takes a third to two thirds of the time")
    if processes == 1 and (busy := cores_in_use()):
        advice.append(busy)
    return advice


def choose_device(device: str) -> str:
    """Return the kind of device that a run uses, "cuda", "cpu" or "mps", and make `cuda:N` the current device.

    Args:
        device: Value of the recipe's key `device`. "auto" is CUDA where there is a device, else the CPU.

    Raises:
        UserError: If this machine does not have the device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {device}: no CUDA device was found here (`mpp doctor` says why); use auto or cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps: torch finds no Apple GPU here; use auto or cpu")
    if index:
        count = torch.cuda.device_count()
        if int(index) >= count:
            raise UserError(f"device: {device}: this machine has {count}, from cuda:0 to cuda:{count - 1}")
        torch.cuda.set_device(int(index))
    return kind


def multiply_in_tf32(rounded: bool) -> None:
    """Set whether this process uses TF32 for fp32 matrix products and convolutions on CUDA devices, from now on.

    torch's default is TF32 for convolutions, but not for products.

    Args:
        rounded: Whether numbers are rounded to TF32.
    """
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    torch.backends.cudnn.allow_tf32 = rounded


def write_attention_out(written_out: bool) -> None:
    """Set whether this process computes attention by two products and a softmax, or by torch's fused kernel.

    Two products are used for bf16 on CPUs, where the backward pass of the fused kernel is slow. A step then takes 0.65
    to 0.8 of the time (recipes/LOG.md), but keeps a matrix of tokens × tokens for each head.

    Args:
        written_out: Whether to use two products and a softmax.
    """
    torch.backends.cuda.enable_flash_sdp(not written_out)  # in spite of its name, this also applies to CPUs
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(written_out)


def prefer_channels_last(model: torch.nn.Module) -> None:
    """Store the weights of a convolutional network in channels-last format, in place, because this is fastest.

    A step of a narrow ResNet in bf16 on a CPU takes 0.78 of the time (recipes/LOG.md). A network with batch norms
    counts as convolutional; others are not changed.
    """
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.to(memory_format=torch.channels_last)


def compile_forward(model: torch.nn.Module, device: torch.device) -> None:
    """Compile the model's forward pass with `torch.compile`, in place. Names and state do not change.

    Raises:
        UserError: If torch cannot compile on this machine.
    """
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # no C++ compiler, no Triton, or a Python version that torch does not support yet
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = f"torch cannot compile on this machine ({first.strip()}); use compile=false"
        raise UserError(f"compile: {reason}") from error
    torch._inductor.config.fallback_random = True  # compiled or not, the same numbers are drawn
    model.compile()
