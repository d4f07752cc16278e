"""Compare mpp with PyPI's peers on a GPU, in one command of at most eight minutes.

    python tools/bench/gpu.py [--peers PYTHON] [--minutes 8] [--sizes vit_s vit_b vit_l vit_h]

The first table is of training steps in bf16 at 224 px (images/s, MFU, memory on the device), one contestant at a time.
The second is of input from JPEGs of 375×500, with as many workers as there are cores.

MFU is the FLOP of a step, as torch counts it, over the device's dense bf16 peak of NVIDIA's data sheets. If a device is
not listed here, a product of large matrices is measured beforehand instead. What did not fit into the time is named,
and the exit code is then 1, as for failures.

Without a GPU it runs at a tiny size. That shows that the command works, not how fast anything is.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pictures
import torch
from bench import OURS, contest
from timing import Contestant, Failed, Spread, interleave, rates

PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "H200": 989.4, "A100": 312.0, "L40S": 362.0}
"""Dense bf16 peak in TFLOP/s by a part of the device's name. The first part that is in the name counts."""
BATCH = {"tiny": 4, "vit_s": 256, "vit_b": 256, "vit_l": 128, "vit_h": 64}
CONTESTANTS = (
    OURS, f"{OURS}, compiled", "mpp MAE", "lightly MAE", "transformers MAE", "vit-pytorch MAE", "transformers SimMIM",
    "mpp SimMIM",
)  # fmt: skip
INPUT = ("mpp", "torchvision ImageFolder", "webdataset + torchvision")
INPUT_COPIES = 10
"""Copies of each photograph. Dataloaders that start again at the end of their data must not do so all the time."""
ROUNDS, TURN_S = 3, 1.5
LONGEST_CONTESTANT_S = 75
"""Longest time of a contestant (compiling ViT-H), in s. None begins later than this before the end."""


def measured(
    names: Sequence[str],
    bench: str,
    settings: dict[str, Any],
    given: argparse.Namespace,
    until: float,
    missing: list[str],
) -> Iterator[tuple[Contestant, Spread]]:
    """Yield contestants, each alone on the device, with their images/s. Add a line to `missing` for each that fails."""
    for name in names:
        failed: list[str] = []
        if time.monotonic() > until - LONGEST_CONTESTANT_S:
            failed.append(f"{name}: no time was left")
        else:
            try:
                with contest([name], bench, settings, given, failed) as alone:
                    for contestant in alone:
                        interleave([contestant], rounds=ROUNDS, turn_s=TURN_S)
                        yield contestant, rates(contestant)
            except Failed as error:
                failed.append(str(error))
        missing += [f"{settings.get('size', 'input')}: {line}" for line in failed]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="PYTHON", help="that has requirements.txt; else only ours run")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--sizes", nargs="+", choices=BATCH, help="default: all on a GPU, tiny without one")
    given = parser.parse_args(words)
    until, missing = time.monotonic() + 60 * given.minutes, list[str]()
    cuda = torch.cuda.is_available()
    device, name = ("cuda", torch.cuda.get_device_name()) if cuda else ("cpu", "CPU, tiny: for a try of the command")
    sizes = given.sizes or (["vit_l", "vit_b", "vit_s", "vit_h"] if cuda else ["tiny"])
    common = {"decoder": "small", "precision": "bf16", "device": device}

    peak, source = next((v for part, v in PEAK_TFLOPS.items() if part in name), 0.0), "data sheet"
    for gemm, rate in measured(["GEMM"], "STEP", {"size": "tiny", **common}, given, until, missing):
        reached = rate.median * gemm.facts["gflop_per_image"] / 1e3
        if not peak:
            peak, source = reached, "measured"
        print(f"{name}, torch {torch.__version__}: bf16 peak {peak:.4g} TFLOP/s ({source}), GEMM {reached:.4g}\n")
    print("| size | | batch | images/s (quartiles) | GFLOP an image | MFU | MiB |\n|---|---|---|---|---|---|---|")
    for size in sizes:
        settings = {"size": size, "batch": BATCH[size], **common}
        for c, rate in measured(CONTESTANTS, "STEP", settings, given, until, missing):
            gflop = c.facts["gflop_per_image"]
            memory = max(t.device_peak_mib if cuda else t.peak_mib for t in c.turns)
            print(
                f"| {size} | {c.name} | {BATCH[size]} | {rate.median:,.0f} ({rate.low:,.0f} – {rate.high:,.0f}) "
                f"| {gflop:.4g} | {rate.median * gflop / 1e3 / (peak or math.nan):.3f} | {memory:,.0f} |",
                flush=True,
            )
    workers = os.cpu_count() or 1
    print(f"\n| JPEGs of 375×500, {workers} workers | images/s (quartiles) |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pictures.main(Path(folder), only=("375x500",), copies=INPUT_COPIES if cuda else 1)
        settings = {"pictures": f"{folder}/375x500", "side_px": 224, "batch": 64 if cuda else 16, "workers": workers}
        for c, rate in measured(INPUT, "INPUT", settings, given, until, missing):
            print(f"| {c.name} | {rate.median:,.0f} ({rate.low:,.0f} – {rate.high:,.0f}) |", flush=True)
    for line in missing:
        print(f"missing: {line}", file=sys.stderr)
    sys.exit(bool(missing))


if __name__ == "__main__":
    main()
