"""Check mpp on a GPU in at most eight minutes, and write what was found as Markdown.

    python tools/gpu_check.py [--out gpu_check.md] [--minutes 8] [--peers PYTHON]

1. `demo` is trained on drawn images in fp32, in bf16 and compiled. Its losses are compared with those of this machine's
   CPU. One run is killed by SIGKILL and resumed.
2. Two steps of a model that FSDP2 holds on one process. No weights are exchanged there.
3. Memory of a step, compared with `mpp plan`, and the time that `vit_small` waits for JPEGs of 375×500.
4. The tests that are marked `cuda`.
5. Speed, MFU and memory of steps beside other toolkits, by tools/bench/gpu.py, with the time that is left.

Each check has a line in the first table: what was found, "failed" and why, or "not run". The exit code is 1 if a check
failed. Without a GPU, everything but the tests runs at a tiny size on the CPU. That shows that the script works.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mpp.data.loader import READ_AHEAD
from mpp.parallel.devices import cores

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tools" / "bench"), str(ROOT / "tools")]

STEPS = 60
COMPARED_STEPS = 20
"""Number of first steps whose losses are compared. Rounding grows with every step."""
TOLERANCES = {"fp32": 5e-3, "compiled": 5e-3, "bf16": 5e-2}
"""Largest relative difference of a loss from the CPU's, in fp32 (guesses)."""
MOST_WORKERS = 8
"""Most workers that read images. Each adds batches to the run that must pass before a step can wait."""
LOGGED_STEPS = 4
"""Steps of a line of metrics in `waiting`."""
KILLED_AFTER = 25
"""Lines of metrics after which a run is killed."""
MEMORY_MARGIN = 0.2
"""Largest part by which a step may need more memory than `mpp plan` says (a guess)."""
TINY_VIT = (
    "data.image_size=16",
    "encoder.args={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    "corruption.enter=1",
)
"""Changes to `vit_small` for a try on a CPU."""


class Failed(Exception):
    """A check that did not pass, in one line."""


def run(words: Sequence[str | Path], timeout_s: float, **environment: str) -> str:
    """Run a Python command and return what it printed.

    Raises:
        Failed: If it fails or takes too long.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    try:
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=ROOT, env=env, text=True, capture_output=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"took more than {timeout_s:.0f} s") from error
    if done.returncode:
        raise Failed(((done.stderr or done.stdout).strip().splitlines() or ["it printed nothing"])[-1])
    return done.stdout


def losses_of(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Return the largest relative difference of two equally long courses of losses; inf if a loss is not finite."""
    if not all(map(math.isfinite, (*losses, *others))):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


class Check:
    """The checks, which share drawn images and the losses of the CPU.

    Args:
        folder: Folder for images and runs.
        cuda: Whether there is a GPU.
        until: End of the time, by `time.monotonic()`.
        peers: Python that has the other toolkits. None means that only mpp is timed.
    """

    def __init__(self, folder: Path, *, cuda: bool, until: float, peers: str | None) -> None:
        self.folder, self.cuda, self.until, self.peers = folder, cuda, until, peers
        self.rows: list[str] = []
        """Lines of tables below the first."""

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()

    def demo(self, name: str, *changes: str, resume: bool = False) -> list[str | Path]:
        """Return the command that trains the recipe `demo` on drawn images into the folder `name`."""
        short = (f"optim.steps={STEPS}", "optim.warmup_steps=5", "log_every_steps=1", "checkpoint_every_steps=10")
        data = (f"data.shards={self.folder / 'drawn' / 'unlabeled'}", "data.channels=3")
        words: list[str | Path] = ["-m", "mpp", "pretrain", "demo", *data, *short, *changes]
        return [*words, f"out={self.folder / name}", *(["--resume", "auto"] if resume else [])]

    def tests(self) -> str:
        """Run the tests that are marked `cuda`."""
        if not self.cuda:
            return "not run: no GPU"
        printed = run(["-m", "pytest", "-o", "addopts=", "-m", "cuda", "tests"], self.left_s)
        result = printed.strip().splitlines()[-1].strip("= ")
        if " passed" not in result or "skipped" in result:
            raise Failed(result)
        return result

    def training(self) -> str:
        """Train in fp32, bf16 and compiled, and compare the losses with those of the CPU in fp32."""
        import draw_shapes

        draw_shapes.main([str(self.folder / "drawn"), "--unlabeled", "400", "--train", "1", "--val", "1"])
        run(self.demo("cpu", "precision=fp32"), self.left_s, CUDA_VISIBLE_DEVICES="")
        expected = losses_of(self.folder / "cpu")[:COMPARED_STEPS]
        self.rows += ["", "| `demo` | largest difference of a loss from the CPU in fp32 | seconds |", "|---|---|---|"]
        over = []
        ways: dict[str, tuple[str, ...]] = {"fp32": ("precision=fp32",), "bf16": ("precision=bf16",)}
        if self.cuda:
            ways["compiled"] = ("precision=fp32", "compile=true")
        for name, changes in ways.items():
            began = time.monotonic()
            run(self.demo(name, *changes), self.left_s)
            found = difference(losses_of(self.folder / name)[:COMPARED_STEPS], expected)
            self.rows.append(f"| {name} | {found:.1e} | {time.monotonic() - began:.0f} |")
            over += [f"{name} differs by {found:.1e}"] if not found <= TOLERANCES[name] else []
            over += ["bf16 has the losses of fp32"] if name == "bf16" and not found else []
        if over:
            raise Failed("; ".join(over))
        return f"{COMPARED_STEPS} losses agree"

    def resuming(self) -> str:
        """Kill a run by SIGKILL, resume it, and compare its losses with those of the run that was not killed.

        If the losses differ, the run without a kill is repeated. Some kernels of GPUs do not give the same bits twice.
        """
        out = self.folder / "killed"
        words = [sys.executable, *map(str, self.demo("killed", "precision=fp32"))]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and self.left_s > 0:
            metrics = out / "metrics.jsonl"
            if metrics.exists() and len(metrics.read_text().splitlines()) >= KILLED_AFTER:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if len(losses_of(out)) >= STEPS:
            raise Failed("the run had finished before it was killed")
        run(self.demo("killed", "precision=fp32", resume=True), self.left_s)
        resumed = re.search(r"resumed at step (\d+)", (out / "train.log").read_text())
        if resumed is None or int(resumed[1]) == 0:
            raise Failed("the run began again at its first step")
        expected = losses_of(self.folder / "fp32")
        found = difference(losses_of(out), expected)
        if found:
            run(self.demo("repeated", "precision=fp32"), self.left_s)
            repeated = difference(losses_of(self.folder / "repeated"), expected)
            if not repeated or found > TOLERANCES["fp32"]:
                raise Failed(f"the losses differ by up to {found:.1e}, those of a repeated run by {repeated:.1e}")
            return f"losses differ by {found:.1e}, those of a repeated run by {repeated:.1e}"
        return f"{len(expected)} losses are equal to the last bit, after step {resumed[1]}"

    def sharding(self) -> str:
        """Make two steps of a model that FSDP2 holds on one process, and compare their losses with the plain model.

        torch gathers no weights on one process, so this does not show that the exchange between GPUs works.
        """
        code = (
            "import sys; sys.path.insert(0, 'tools'); import gpu_check\n"
            f"print(gpu_check.sharded_difference({'cuda' if self.cuda else 'cpu'!r}))"
        )
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        found = float(run(["-c", code], self.left_s, **rendezvous).split()[-1])
        if not found <= TOLERANCES["fp32"]:
            raise Failed(f"the losses differ by {found:.1e}")
        return f"losses differ by {found:.1e}; no weights are exchanged on one process"

    def memory(self) -> str:
        """Compare the memory of a step with what `mpp plan` says of it."""
        import measure_plan

        over, device = list[str](), torch.device("cuda" if self.cuda else "cpu")
        ratios: dict[str, float] = {}
        self.rows += ["", "| memory of a step in bf16 | images | planned MB | measured MB |", "|---|---|---|---|"]
        sizes = {"vit_small": 256, "mae_vit_b16": 128, "mae_vit_l16": 64} if self.cuda else {"vit_small": 8}
        for name, images in sizes.items():
            changes = () if self.cuda else TINY_VIT
            planned, measured = measure_plan.planned_and_measured(name, images, changes, device, "bf16")
            shown = f"{measured / 1e6:,.1f}" if self.cuda else "not measured on a CPU"
            self.rows.append(f"| {name} | {images} | {planned / 1e6:,.1f} | {shown} |")
            ratios[name] = measured / planned
            if self.cuda and measured > (1 + MEMORY_MARGIN) * planned:
                over.append(f"{name}: planned {planned / 1e9:.1f} GB, measured {measured / 1e9:.1f} GB")
        if over:
            raise Failed("; ".join(over))
        if not self.cuda:
            return "planned; not measured on a CPU"
        gc.collect()
        torch.cuda.empty_cache()  # the following checks are processes of their own
        return "measured / planned: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())

    def waiting(self) -> str:
        """Train `vit_small` on JPEGs of 375×500, with a worker for each core, and say how long it waits for them."""
        import pictures

        pictures.main(self.folder / "pictures", only=("375x500",), copies=10 if self.cuda else 1)
        workers, images = (min(cores(), MOST_WORKERS), 256) if self.cuda else (0, 8)
        ahead = workers * READ_AHEAD  # batches that the workers have ready at the start, for which no step waits
        steps = 2 * ahead + 2 * LOGGED_STEPS
        size = [f"optim.global_batch_size={images}", f"optim.steps={steps}", *(() if self.cuda else TINY_VIT)]
        data = [f"data.shards={self.folder / 'pictures' / '375x500-shards'}", "data.held_out=8"]
        data += [f"data.workers={workers}", f"log_every_steps={LOGGED_STEPS}"]
        out = self.folder / "waiting"
        fixed = ["optim.warmup_epochs=0", "reconstruct_images=0", f"skill_every_steps={2 * steps}"]
        run(["-m", "mpp", "pretrain", "vit_small", *data, *size, *fixed, f"out={out}"], self.left_s)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steady = [line for line in lines if ahead <= line["step"] - LOGGED_STEPS and line["step"] < steps]
        if not steady:
            raise Failed(f"none of {len(lines)} lines of metrics is of the middle of the run")
        rate, wait = (sum(line[key] for line in steady) / len(steady) for key in ("images_per_s", "data_wait"))
        return f"{rate:,.0f} images/s, {wait:.0%} of the time waiting for images, {workers} workers"

    def speed(self) -> str:
        """Run tools/bench/gpu.py with the time that is left, and add its tables."""
        words = ["tools/bench/gpu.py", "--minutes", f"{self.left_s / 60:.2f}"]
        words += ["--peers", self.peers] if self.peers else []
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(
                [sys.executable, *words], cwd=ROOT, env=env, text=True, capture_output=True, timeout=self.left_s
            )
        except subprocess.TimeoutExpired as error:
            raise Failed("the rows were not finished in time") from error
        self.rows += ["", *done.stdout.strip().splitlines()]
        missing = [line for line in done.stderr.splitlines() if line.startswith("missing: ")]
        broken = [line for line in missing if not line.endswith("no time was left")]
        if broken or (done.returncode and not missing):
            raise Failed("; ".join(broken) or (done.stderr.strip().splitlines() or ["it printed nothing"])[-1])
        if "| mpp" not in done.stdout:
            raise Failed("no time was left")
        return f"{len(missing)} rows left out, no time was left" if missing else "all rows"


CHECKS: tuple[Callable[[Check], str], ...] = (
    Check.training, Check.resuming, Check.sharding, Check.memory, Check.waiting, Check.tests, Check.speed
)  # fmt: skip


def sharded_difference(device: str) -> float:
    """Return the largest relative difference of two losses of a sharded model from those of the plain model."""
    import torch.distributed as dist

    from mpp.objective.build import build_mask, build_model
    from mpp.objective.mask_drawing import draw_masks
    from mpp.parallel.sharding import shard
    from mpp.recipe.loading import load_recipe
    from mpp.recipe.pretrain import PretrainRecipe

    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    recipe = load_recipe("demo", PretrainRecipe, {"data.shards": "not opened", "data.channels": 3})
    courses = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model, grid = build_model(recipe)
        model.train()
        if sharded:
            shard(model, torch.device(device))
        else:
            model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        images = torch.randint(0, 255, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        course = []
        for step in range(2):
            units = draw_masks(build_mask(recipe), grid, 0.5, 0, range(16 * step, 16 * step + 16), 1)
            loss = model(images.to(device), units.tensors_by(lambda t: t.to(device))).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            course.append(float(loss))
        courses.append(course)
    dist.destroy_process_group()
    return difference(*courses)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.md"), help="file for the tables")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument(
        "--peers",
        metavar="PYTHON",
        help="Python with the packages of tools/bench/requirements.txt; without it only mpp is timed",
    )
    given = parser.parse_args(words)
    cuda, until = torch.cuda.is_available(), time.monotonic() + 60 * given.minutes
    name = torch.cuda.get_device_name() if cuda else "CPU, tiny: for a try of the script"
    table = [f"{name}, torch {torch.__version__}", "", "| check | result | seconds |", "|---|---|---|"]
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        check = Check(Path(folder), cuda=cuda, until=until, peers=given.peers)
        for one in CHECKS:
            began = time.monotonic()
            try:
                if check.left_s < 10:
                    raise Failed("no time was left")
                result = one(check)
            except Exception as error:  # one check that fails must not hide the others
                passed, result = False, f"failed: {error if isinstance(error, Failed) else repr(error)}"
            line = f"| {one.__name__} | {' '.join(result.split())} | {time.monotonic() - began:.0f} |"
            print(line, flush=True)
            table.append(line)
            given.out.write_text("\n".join([*table, *check.rows]) + "\n")  # after each check, in case the time ends
    print(f"{given.out}: written")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
