"""Check that a long run with faults all along ends as the same run without faults.

    python -m tests.faults.soak OUT [--minutes 20] [--seed 0] [--every-s 30]

Two processes with a loader worker each pretrain a tiny encoder on remote shards, in a cache smaller than the shards.
The first run is undisturbed, and the memory of every process is measured. The second has a fault every few seconds.
After a fault that ends it, it is resumed. Every logged loss and the exported weights are compared bit by bit. The exit
code is 1 if they differ, memory grows, or a process hangs. The rate of steps is measured first, so that the undisturbed
run takes the given minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpp.runs.records import read_metrics
from tests.conftest import ROOT, drawn_image, encoded
from tests.data.test_loader import shard_of
from tests.faults.processes import children, launched, left, pretraining
from tests.http_server import Served, serve

SHARDS, IMAGES = 8, 250
WORLD = 2
LOG_EVERY_STEPS = 20
MOST_WAIT_S = 30.0
"""Time in which every process must end once one has, in s. Then the others are killed, as torchrun does."""
MOST_GROWTH = 0.05
"""Growth of a process's memory over the run that counts as flat, as a fraction, by the slope of the second half."""
POINTS = (
    "save.begins",
    "save.model_written",
    "save.manifest_written",
    "save.before_rename",
    "save.renamed",
    "prune.inside",
)


class Run:
    """The processes of one start of the run."""

    def __init__(self, recipe: Path, log: Path, fault: dict[str, Any] | None = None) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if fault:
            env["MPP_FAULT"] = json.dumps(fault)
        words = ["-m", "mpp", "pretrain", str(recipe), "--resume", "auto"]
        self.log, self.said_before = log, log.stat().st_size if log.exists() else 0
        with open(log, "a") as lines:
            self.ranks = [
                subprocess.Popen(
                    [sys.executable, *words], cwd=ROOT, env={**env, **own},
                    stdout=lines, stderr=lines, stdin=subprocess.DEVNULL, start_new_session=True,
                )
                for own in launched(WORLD)
            ]  # fmt: skip

    def codes(self) -> list[int | None]:
        return [rank.poll() for rank in self.ranks]

    def end(self) -> list[int | None]:
        """Return the exit codes once all processes have ended. None means that the process was killed here."""
        deadline = time.monotonic() + MOST_WAIT_S
        while None in self.codes() and time.monotonic() < deadline:
            time.sleep(0.05)
        found = self.codes()
        self.kill()
        return found

    def trained(self) -> bool:
        with open(self.log) as lines:
            lines.seek(self.said_before)
            return re.search(r"^step \d+/", lines.read(), re.MULTILINE) is not None

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()

    def workers(self) -> list[int]:
        return [pid for rank in self.ranks for pid in children(rank.pid)]


def memory_kib(pid: int) -> int | None:
    """Return the memory of a process that belongs to no file, in KiB.

    The proportional set size would grow without cause. What a forked worker shares with its parent is counted by
    halves, until one of them writes to it.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)


def recipe_of(base: Path, name: str, served: Served, steps: int) -> Path:
    size = max(p.stat().st_size for p in served.folder.glob("*.tar"))
    changes: dict[str, Any] = {
        "data.shards": f"{served.url}/s{{0..{SHARDS - 1}}}.tar",
        "data.cache_dir": str(base / name / "cache"),
        "data.cache_limit_gb": 5.5 * size / 1e9,
        "data.lanes": 2,
        "data.window": IMAGES,
        "data.workers": 1,
        "optim.steps": steps,
        "log_every_steps": LOG_EVERY_STEPS,
        "skill_every_steps": 500,
        "checkpoint_every_steps": 100,
        "hang_timeout_s": 15,
    }
    return pretraining(base, base / name / "recipe.yaml", base / name / "run", **changes)


def undisturbed(base: Path, name: str, served: Served, steps: int) -> tuple[float, dict[str, list[tuple[float, int]]]]:
    """Run without faults. Return the seconds it took, and (second, KiB) of each process."""
    began, measured = time.monotonic(), defaultdict(list)
    run = Run(recipe_of(base, name, served, steps), base / name / "log")
    while None in run.codes():
        named = {f"process {i}": rank.pid for i, rank in enumerate(run.ranks)}
        named |= {f"worker of process {i}": pid for i, rank in enumerate(run.ranks) for pid in children(rank.pid)}
        for who, pid in named.items():
            if (found := memory_kib(pid)) is not None:
                measured[who].append((time.monotonic() - began, found))
        time.sleep(1)
    if run.codes() != [0] * WORLD:
        raise SystemExit(f"the undisturbed run ended with {run.codes()}: see {base / name / 'log'}")
    return time.monotonic() - began, measured


class Faults:
    """Faults by name. Each returns whether the processes must be waited for."""

    def __init__(self, base: Path, served: Served, rng: random.Random) -> None:
        self.out, self.cache, self.served, self.rng = base / "run", base / "cache" / "shards", served, rng
        self.counts: Counter[str] = Counter()
        self.acts: dict[str, Callable[[Run], bool]] = {
            "kill -9 of a process": lambda run: self._signal([r.pid for r in run.ranks], signal.SIGKILL),
            "kill -9 of a loader worker": lambda run: self._signal(run.workers(), signal.SIGKILL),
            "SIGTERM to a process": lambda run: self._signal([r.pid for r in run.ranks], signal.SIGTERM),
            "SIGINT to a process": lambda run: self._signal([r.pid for r in run.ranks], signal.SIGINT),
            "SIGSTOP of a process": lambda run: self._signal([r.pid for r in run.ranks], signal.SIGSTOP),
            "SIGSTOP of a loader worker": lambda run: self._signal(run.workers(), signal.SIGSTOP),
            "a shard taken out of the cache": self._lose_a_shard,
            "answers cut short, 500s and 503s": self._break_answers,
            "an empty cache": self._empty_cache,
            "kill -9, and a byte of the newest checkpoint flipped": self._flip,
            "kill -9, and a file of the newest checkpoint gone": self._remove,
            "kill -9, and the last line of the metrics cut": self._cut_metrics,
        }

    def _signal(self, pids: list[int], number: int) -> bool:
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.rng.choice(pids), number)
        return True

    def _lose_a_shard(self, run: Run) -> bool:
        there = sorted(self.cache.glob("*.tar"))
        if there:
            self.rng.choice(there).unlink(missing_ok=True)
        return False

    def _empty_cache(self, run: Run) -> bool:
        for path in self.cache.glob("*.tar*"):
            if path.suffix != ".lock":
                path.unlink(missing_ok=True)
        return False

    def _break_answers(self, run: Run) -> bool:
        kinds: list[dict[str, Any]] = [{"cut": 5000}, {"cut": 0}, {"status": 500}, {"status": 503, "retry_after_s": 1}]
        self.served.faults += [self.rng.choice(kinds) for _ in range(6)]
        return self._lose_a_shard(run)

    def _newest(self, run: Run) -> Path | None:
        run.kill()
        found = sorted(p for p in (self.out / "checkpoints").glob("step-*") if (p / "manifest.json").exists())
        return found[-1] if len(found) > 1 else None  # the checkpoint before it must suffice

    def _flip(self, run: Run) -> bool:
        newest = self._newest(run)
        if newest:
            file = self.rng.choice(sorted(newest.glob("*.safetensors")))
            data = bytearray(file.read_bytes())
            data[self.rng.randrange(len(data))] ^= 0x40
            file.write_bytes(data)
        return True

    def _remove(self, run: Run) -> bool:
        newest = self._newest(run)
        if newest:
            self.rng.choice(sorted(p for p in newest.iterdir() if p.is_file())).unlink()
        return True

    def _cut_metrics(self, run: Run) -> bool:
        run.kill()
        path = self.out / "metrics.jsonl"
        newest = max((int(p.name[5:]) for p in (self.out / "checkpoints").glob("step-*[0-9]")), default=0)
        if path.exists() and read_metrics(self.out)[-1]["step"] > newest:  # a line after the last checkpoint
            os.truncate(path, path.stat().st_size - self.rng.randrange(1, 9))
        return True


def disturbed(
    base: Path, served: Served, steps: int, rng: random.Random, every_s: float
) -> tuple[Counter[str], list[str]]:
    """Run with faults. Return how often each one happened, and what went wrong."""
    recipe = recipe_of(base, "disturbed", served, steps)
    faults, wrong, log = Faults(base / "disturbed", served, rng), [], base / "disturbed" / "log"
    while True:
        at_point = {"point": rng.choice(POINTS), "nth": rng.randint(1, 3), "do": "kill"} if rng.random() < 0.3 else None
        run = Run(recipe, log, at_point)
        name = ""
        while None in run.codes() and not any(run.codes()):
            pause = time.monotonic() + rng.uniform(0.5, 2 * every_s)
            while time.monotonic() < pause and None in run.codes() and not any(run.codes()):
                time.sleep(0.05)
            if None not in run.codes() or any(run.codes()):
                break
            name = rng.choice(list(faults.acts))
            faults.counts[name] += 1
            if faults.acts[name](run):
                break
        codes = run.end()
        if at_point and -signal.SIGKILL in codes:
            faults.counts[f"perhaps kill -9 at {at_point['point']}"] += 1
        state = json.loads((base / "disturbed" / "run" / "status.json").read_text())["state"] if codes == [0, 0] else ""
        if state == "finished":
            return faults.counts, wrong
        # a process that is signalled before it handles signals just ends, and the others wait for it in vain
        trained = run.trained()
        may_stay = name == "SIGSTOP of a process" if trained else WORLD
        stopped = {128 + signal.SIGTERM, 128 + signal.SIGINT}
        allowed = {0, 2, -signal.SIGKILL, None, *stopped} | (set() if trained else {-signal.SIGTERM, -signal.SIGINT})
        if codes.count(None) > may_stay or set(codes) - allowed:
            wrong.append(f"{name or at_point}: ended with {codes}")
            print(wrong[-1], flush=True)


def slopes(measured: dict[str, list[tuple[float, int]]]) -> dict[str, tuple[float, float]]:
    """Return level and growth of memory in the run's second half, for each process that lived so far.

    The level is the median in MiB, the growth is in MiB per hour.
    """
    longest = max(series[-1][0] for series in measured.values())
    found = {}
    for who, series in measured.items():
        late = np.array([(second, kib / 1024) for second, kib in series if second > longest / 2])
        if len(late) > 10:
            slope, _ = np.polyfit(late[:, 0], late[:, 1], 1)
            found[who] = float(np.median(late[:, 1])), float(slope * 3600)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-s", type=float, default=30.0, help="mean time between two faults")
    given = parser.parse_args()
    if given.out.exists():
        raise SystemExit(f"{given.out}: is there already")
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell makes background jobs ignore it, and children inherit that
    (given.out / "served").mkdir(parents=True)
    for i in range(SHARDS):
        images = [encoded(drawn_image(IMAGES * i + j), "PNG") for j in range(IMAGES)]
        shard_of(given.out / "served" / f"s{i}.tar", images)
    served, server = serve(given.out / "served")
    seconds, _ = undisturbed(given.out, "rate", served, 300)
    longer, _ = undisturbed(given.out, "rate again", served, 1300)
    steps = int(1000 / (longer - seconds) * given.minutes * 60)
    print(f"{steps} steps, {1000 / (longer - seconds):.1f} a second", flush=True)
    shutil.rmtree(given.out / "rate")
    shutil.rmtree(given.out / "rate again")
    took, measured = undisturbed(given.out, "undisturbed", served, steps)
    print(f"undisturbed: {took / 60:.1f} minutes", flush=True)
    began = time.monotonic()
    counts, wrong = disturbed(given.out, served, steps, random.Random(given.seed), given.every_s)
    print(f"disturbed: {(time.monotonic() - began) / 60:.1f} minutes, {sum(counts.values())} faults", flush=True)
    for name, count in sorted(counts.items()):
        print(f"| {name} | {count} |")
    for who, (level, slope) in slopes(measured).items():
        print(f"| {who} | {level:.1f} MiB | {slope:+.2f} MiB an hour |")
        if slope * took / 3600 > MOST_GROWTH * level:
            wrong.append(f"{who} grows")
    one, other = (left(given.out / name / "run") for name in ("undisturbed", "disturbed"))
    lines = sum(len(losses) for losses in one.losses.values())
    # a run that is asked to stop logs a line more
    kept = {
        file: [line for line in found if line in one.losses[file] or line[0] % LOG_EVERY_STEPS == 0]
        for file, found in other.losses.items()
    }
    same = kept == one.losses and one.weights == other.weights
    print(f"{lines} logged losses equal: {kept == one.losses}; weights equal: {one.weights == other.weights}")
    if not same:
        wrong.append("losses or weights differ")
    server.shutdown()
    if wrong:
        raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()
