"""Compare the speed of both training loops with another checkout of mpp: whole runs, interleaved, on the CPU.

    python tools/bench/against.py ../mpp-before --pairs 5

Each run is its own process, with one thread for the loop and one dataloader worker. The median images/s of the run's
lines of metrics is compared, without the start and the first steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 512
SIDE_PX = 32
VIT = {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}
FIRST_STEPS = 20
"""Optimizer steps that are left out, and number of steps between two lines of metrics."""


def draw(folder: Path) -> None:
    """Write class folders of simple images."""
    for i in range(IMAGES):
        path = folder / ("dark" if i % 2 else "light") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        gradient = np.linspace(0, 60, SIDE_PX)[:, None] + np.linspace(0, 60, SIDE_PX)
        pixels = (gradient + 20 + (37 * i) % 40 + 90 * (i % 2)).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(path)


def recipe(job: str, images: Path, out: Path, steps: int) -> dict[str, object]:
    """Return a recipe that logs after the first steps and at the end."""
    data: dict[str, object] = {"image_size": SIDE_PX, "workers": 1}
    shared = {"job": job, "out": str(out), "log_every_steps": FIRST_STEPS, "checkpoint_every_steps": 10**6}
    optim = {"steps": steps, "global_batch_size": 64, "max_batch_per_device": 64}
    model = {"name": "vit_tiny_patch16_224", "args": VIT}
    if job == "pretrain":
        measuring = {"skill_every_steps": 10**6, "reconstruct_images": 0}
        return {**shared, **measuring, "optim": optim, "encoder": model, "data": {**data, "shards": str(images)}}
    cells = {"encoder": "scratch", "architecture": model, "seeds": [0]}
    return {**shared, **cells, "optim": optim, "data": {**data, "train": str(images), "val": str(images)}}


def images_per_s(checkout: Path, job: str, images: Path, folder: Path, steps: int) -> float:
    """Run a job with the code of a checkout. Return the median images/s of its lines of metrics after the first one."""
    file = folder / "recipe.yaml"
    out = folder / "run"
    file.write_text(json.dumps(recipe(job, images, out, steps)))
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mpp", job, str(file)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    (metrics,) = [*out.glob("metrics.jsonl"), *out.glob("*-seed0/metrics.jsonl")]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return statistics.median(line["images_per_s"] for line in lines if line["step"] > FIRST_STEPS)


def main() -> None:
    """Print the images/s of both checkouts, and their ratio with its range, for each loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="Another checkout of mpp.")
    parser.add_argument("--pairs", type=int, default=5, help="Runs of each checkout; default 5.")
    parser.add_argument("--job", choices=("pretrain", "finetune"), help="One of the loops; default both.")
    parser.add_argument("--steps", type=int, default=120, help=f"Of a run, of which {FIRST_STEPS} are left out.")
    given = parser.parse_args()
    other = given.other.resolve()
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        draw(images)
        for job in (given.job,) if given.job else ("pretrain", "finetune"):
            rates: dict[Path, list[float]] = {ROOT: [], other: []}
            for pair in range(given.pairs):
                for checkout in (ROOT, other) if pair % 2 else (other, ROOT):
                    with tempfile.TemporaryDirectory() as run:
                        rates[checkout].append(images_per_s(checkout, job, images, Path(run), given.steps))
            ratios = sorted(here / there for here, there in zip(rates[ROOT], rates[other], strict=True))
            here, there = (statistics.median(rates[c]) for c in (ROOT, other))
            spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
            print(f"{job}: {here:.1f} against {there:.1f} images/s; ratio {statistics.median(ratios):.3f} ({spread})")


if __name__ == "__main__":
    main()
