"""Devices for which a plan can be made: memory and peak from datasheets, or measured on this CPU."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from functools import cache

import torch

from mpp.errors import UserError

MFU = 0.3
"""Fraction of a device's peak that a run reaches, if the user does not give one (a guess)."""
PRODUCT = 1024
"""Side of the matrices that are multiplied to measure a CPU's peak."""


@dataclass(frozen=True)
class Device:
    """Memory of a device, and its peaks by precision without sparsity."""

    memory_gb: float
    tflops: dict[str, float]


DEVICES = {
    "a100": Device(80, {"bf16": 312, "tf32": 156, "fp32": 19.5}),
    "h100": Device(80, {"bf16": 989, "tf32": 494, "fp32": 67}),
    "h200": Device(141, {"bf16": 989, "tf32": 494, "fp32": 67}),
    "l40s": Device(48, {"bf16": 362, "tf32": 183, "fp32": 91.6}),
    "a10": Device(24, {"bf16": 125, "tf32": 62.5, "fp32": 31.2}),
    "rtx4090": Device(24, {"bf16": 165, "tf32": 82.6, "fp32": 82.6}),
}
"""Devices with the values of NVIDIA's datasheets (H100 and H200: SXM), without sparsity."""
CPU = "cpu"


@cache
def this_cpu() -> Device:
    """Measure the peak of this machine's CPU with torch's number of threads, and return it with the memory."""
    tflops = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.ones(PRODUCT, PRODUCT, dtype=kind)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - began)
        tflops[name] = 2 * PRODUCT**3 / min(times) / 1e12
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(memory / 1e9, tflops | {"tf32": tflops["fp32"]})


def find_device(name: str) -> Device:
    return this_cpu() if name == CPU else DEVICES[name]


def device_here() -> str:
    """Return the kind of device that a run on this machine would use: one of DEVICES, or the CPU.

    Raises:
        UserError: If the device is a GPU that is not among DEVICES.
    """
    if not torch.cuda.is_available():
        return CPU
    gpu = torch.cuda.get_device_name(0)
    words = re.findall(r"[a-z0-9]+", gpu.lower().replace("rtx ", "rtx"))
    found = [name for name in DEVICES if name in words]
    if not found:
        raise UserError(f"--device: there are no figures for {gpu}; choose the closest of {', '.join(DEVICES)}")
    return found[0]


def memory_here() -> int:
    """Return the bytes of memory of the device that a run on this machine would use."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(this_cpu().memory_gb * 1e9)
