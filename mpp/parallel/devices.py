"""What a device can do: cores, bf16, TF32, attention kernels, compilation."""

from __future__ import annotations

import os

import torch

from mpp.errors import UserError

TF32_FROM = (8, 0)
"""Compute capability."""
SPARE_LOAD = 0.75
"""Of one core, that other work may take before it is spoken of (a guess)."""


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies matrices faster in bf16 than in fp32: AVX512-BF16 or AMX, where torch says so.

    A step then takes half the time, from a ViT 192 wide on; 0.6 of it at 128 (recipes/LOG.md).
    """
    questions = (
        getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(ask() for ask in questions)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_in_use() -> str:
    """Return a line if other work runs on the cores that torch's threads would take; "" if there is room for them."""
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    if threads == 1 or load + threads <= cores() + SPARE_LOAD:
        return ""
    return f"other work takes {load:.1f} of {cores()} cores, so a run is slower than it could be"


def advise_on_cpu(precision: str, processes: int) -> list[str]:
    """Say what would make a run on this machine's CPU faster.

    Args:
        precision: As the recipe has it.
        processes: Of the run. With several of them, how busy the cores are says nothing.
    """
    advice = []
    if precision == "auto" and cpu_has_bf16():
        advice.append("this CPU has instructions for bf16: precision=bf16 may take half the time")
    if precision == "bf16" and not cpu_has_bf16():
        advice.append("this CPU has no instructions for bf16: precision=fp32 takes a third to two thirds of the time")
    if processes == 1 and (busy := cores_in_use()):
        advice.append(busy)
    return advice


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


def prefer_channels_last(model: torch.nn.Module) -> None:
    """Lay the weights of a convolutional network out with channels last, in place, as devices compute them fastest.

    A step of a narrow ResNet in bf16 on a CPU takes 0.78 of the time (recipes/LOG.md). A network with batch norms
    counts as convolutional; the others stay as they are.
    """
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.to(memory_format=torch.channels_last)


def compile_forward(model: torch.nn.Module, device: torch.device) -> None:
    """Compile the model's forward by `torch.compile`, in place: names and state stay as they are.

    Raises:
        UserError: This machine cannot.
    """
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a Python that torch does not know yet
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = f"torch cannot compile on this machine ({first.strip()}); use compile=false"
        raise UserError(f"compile: {reason}") from error
    model.compile()
