"""Check whether a machine is ready for runs, by trying things if possible, and advise what to do."""

from __future__ import annotations

import importlib.util
import io
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mpp.data.decoding.decode import decode_crop
from mpp.data.shards.store import default_cache_dir
from mpp.errors import DISTRIBUTION, how_to_get
from mpp.parallel.devices import cores, cores_in_use, cpu_has_bf16
from mpp.runs.environment import environment

PHOTO_PX = (375, 500)
"""Height and width of the JPEG that is decoded, a little more than ImageNet's average (Deng et al. 2009: 400 × 350)."""
DECODING_S, WRITTEN_BYTES = 1.0, 64 << 20
LEAST_FREE_BYTES = 10e9
LEAST_MEMORY_BYTES = 4e9
MOST_CLOCK_S = 5.0
"""Largest difference between the clocks of this machine and of the storage. Above it, times in records mislead (a
guess)."""
EXTRAS = {
    "lora": "peft",
    "s3": "s3fs",
    "gs": "gcsfs",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "onnx": "onnxruntime",
    "transformers": "transformers",
    "parquet": "pyarrow",
    "multichannel": "tifffile",
    "dicom": "pydicom",
    "map": "sklearn",
}
"""Extras of the project, and a module that each installs."""


@dataclass(frozen=True)
class Finding:
    """One result of `mpp doctor`: a line with what was found, and a line of advice if there is any."""

    what: str
    found: str
    ok: bool = True
    advice: str = ""

    @property
    def state(self) -> str:
        """Kind of the result. A problem needs attention; a note may be useful."""
        return "problem" if not self.ok else "note" if self.advice else "ok"

    def __str__(self) -> str:
        advice = f"\n{'':<25}{self.advice}" if self.advice else ""
        return f"{self.state:<8}{self.what:<17}{self.found}{advice}"


def examine(folder: str = ".") -> Iterator[Finding]:
    """Yield the findings, one after the other.

    Args:
        folder: Folder in which runs will be written.
    """
    for look in (_versions, _devices, _precision, _decoding, _memory, _shared_memory):
        yield from look()
    yield from _disk(Path(folder))
    yield from _optional()


def _versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}", sys.version_info >= (3, 11))
    packages = environment()["packages"]
    yield Finding("packages", ", ".join(f"{name} {installed}" for name, installed in packages.items()))
    for installed, wanted in _unmet():
        yield Finding("packages", f"{installed}; needs {wanted}", False, f"pip install {shlex.quote(wanted)}")


def _unmet() -> list[tuple[str, str]]:
    """Return required packages that are missing or have another version: (what is installed, the requirement).

    Requirements of packages are listed, because the project itself is not on PyPI.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    unmet = []
    try:
        asked = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # not installed: run from a checkout
        return []
    for line in asked:
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(wanted.name)
        except PackageNotFoundError:
            unmet.append((f"{wanted.name} is not installed", f"{wanted.name}{wanted.specifier}"))
            continue
        if not wanted.specifier.contains(installed, prereleases=True):
            unmet.append((f"{wanted.name} {installed}", f"{wanted.name}{wanted.specifier}"))
    return unmet


def _devices() -> Iterator[Finding]:
    yield Finding("cores", f"{cores()}, torch uses {torch.get_num_threads()}", True, cores_in_use())
    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        why = (
            f"torch {torch.__version__} was built for CUDA {cuda}; is there a driver? (nvidia-smi)"
            if cuda
            else ("this torch was built without CUDA: https://pytorch.org/get-started/locally")
        )
        return (yield Finding("GPU", "none", True, f"runs use the CPU; {why}"))
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name, major_minor = torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)
        try:
            a = torch.randn(1024, 1024, device=f"cuda:{i}")
            works = bool(torch.isfinite(a @ a).all())
        except RuntimeError as error:
            works, name = False, f"{name}: {str(error).splitlines()[0]}"
        yield Finding(
            "GPU", f"{name}, {major_minor[0]}.{major_minor[1]}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free", works
        )


def _precision() -> Iterator[Finding]:
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported()
        yield Finding("precision", "bf16 by itself" if bf16 else "fp32: this GPU has no bf16", True)
    elif cpu_has_bf16():
        yield Finding("precision", "fp32 by itself; precision=bf16 may take half the time on this CPU")
    else:
        yield Finding("precision", "fp32; this CPU has no instructions for bf16")


def _photo() -> bytes:
    """Return a JPEG with structure everywhere."""
    rows, columns = np.mgrid[: PHOTO_PX[0], : PHOTO_PX[1]]
    waves = np.stack([np.sin(rows / a + columns / b) for a, b in ((9, 31), (23, 7), (41, 13))], -1)
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    stream = io.BytesIO()
    Image.fromarray((127 + 90 * waves + noise).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _decoding() -> Iterator[Finding]:
    data, count = _photo(), 0
    began = time.process_time()
    while time.process_time() - began < DECODING_S:
        decode_crop(data, lambda w, h: (0, 0, w, h), (224, 224), channels=3, formats=("JPEG",), max_image_pixels=10**7)
        count += 1
    rate = count / (time.process_time() - began)
    yield Finding("decoding", f"{rate:.0f} images/s on a core, JPEGs of {PHOTO_PX[0]}×{PHOTO_PX[1]} px to 224×224")


def _memory() -> Iterator[Finding]:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (1024 * int(lines[key].split()[0]) for key in ("MemAvailable", "MemTotal"))
    except (OSError, ValueError, KeyError):
        return (yield Finding("memory", "cannot be read on this system"))
    ok = free >= LEAST_MEMORY_BYTES
    advice = "" if ok else "a run of a small encoder takes 1 to 4 GB; fewer data.workers take less"
    yield Finding("memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free", ok, advice)


def _shared_memory() -> Iterator[Finding]:
    """Check /dev/shm, through which batches come from loader processes. Containers often have only 64 MB of it."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return
    ok = free >= 1e9
    advice = "" if ok else "batches travel through it: docker run --shm-size 8g, or data.workers=0"
    yield Finding("/dev/shm", f"{free / 1e9:.1f} GB free", ok, advice)


def _existing(place: Path) -> Path:
    """Return the place, or the nearest folder above it that exists."""
    return next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())


def _disk(folder: Path) -> Iterator[Finding]:
    for what, place in (("runs", folder), ("cache", Path(default_cache_dir()))):
        there = _existing(place)
        free = shutil.disk_usage(there).free
        ok = free >= LEAST_FREE_BYTES
        advice = "" if ok else "`mpp plan` says what checkpoints take; data.cache_limit_gb bounds the cache"
        yield Finding(f"disk, {what}", f"{free / 1e9:.0f} GB free at {there}", ok, advice)
    there = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            block, began = os.urandom(1 << 20), time.monotonic()
            for _ in range(WRITTEN_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            took = time.monotonic() - began
            written_at = os.fstat(file.fileno()).st_mtime
    except OSError as error:
        return (yield Finding("writing", f"{there}: {error.strerror}", False, "give another folder: mpp doctor FOLDER"))
    yield Finding("writing", f"{WRITTEN_BYTES / took / 1e6:.0f} MB/s to {there}, on the disk for good")
    apart = abs(time.time() - written_at)
    ok = apart < MOST_CLOCK_S
    yield Finding(
        "clock", f"{apart:.1f} s from that of the storage", ok, "" if ok else "set it: timedatectl set-ntp true"
    )


def _optional() -> Iterator[Finding]:
    missing = [name for name, module in EXTRAS.items() if importlib.util.find_spec(module) is None]
    here = [name for name in EXTRAS if name not in missing]
    if here:
        yield Finding("optional", f"{', '.join(here)}")
    if missing:
        yield Finding("optional", f"without {', '.join(missing)}", True, how_to_get(*missing))
    compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    advice = "" if compiler else "install a C++ compiler, such as g++"
    yield Finding("compile=true", "possible" if compiler else "not possible", True, advice)
