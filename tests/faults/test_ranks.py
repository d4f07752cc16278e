"""One of several processes dies, hangs or computes wrong values. The others end and name it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mpp.parallel.liveness import SILENT_S
from mpp.runs import checkpoint
from mpp.runs.records import read_metrics
from tests.conftest import drawn_image, encoded
from tests.data.test_loader import shard_of
from tests.faults.conftest import RECIPES, Bench
from tests.faults.processes import JOBS, Left, Nursery, children, left, records_of, status, steps_logged

HANG_TIMEOUT_S = 5


@pytest.mark.promise("If a rank is killed, the others name it and end within 10 s, with and without loader workers")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank(victim: int, workers: int, nursery: Nursery, shards: Path, folder: Path) -> None:
    changes = {"optim.steps": 100000, "data.workers": workers, "optim.global_batch_size": 12}
    path, out = RECIPES["pretrain"](shards, folder / "r.yaml", folder / "run", **changes), folder / "run"
    run = nursery.start("pretrain", path, log=folder / "log", world=3)
    run.until(lambda: steps_logged(out) >= 5)
    orphans = children(run.pids[victim])
    assert len(orphans) == workers
    os.kill(run.pids[victim], signal.SIGKILL)
    codes = run.wait(10)
    assert codes == [-9 if rank == victim else 2 for rank in range(3)], run.said()
    assert f"process {victim} (pid {run.pids[victim]} on " in run.said()
    if victim:
        assert status(out)["state"] == "failed"
        assert f"process {victim} (pid" in status(out)["why"]
    assert not [
        pid for pid in orphans if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text()
    ]


@pytest.mark.promise("If a rank never starts, the others end within twice hang_timeout_s and a minute, in one line")
@pytest.mark.exhaustive
@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_never_comes(missing: int, bench: Bench) -> None:
    path = bench.recipe("pretrain", hang_timeout_s=HANG_TIMEOUT_S)
    run = bench.start("pretrain", path)
    os.kill(run.pids[missing], signal.SIGKILL)
    run.until(lambda: run.codes()[1 - missing] is not None, 2 * (HANG_TIMEOUT_S + 60) + 20)
    assert run.codes()[1 - missing] == 2, run.said()
    assert f"process {1 - missing} of 2 did not find the others at 127.0.0.1:" in run.said()
    assert "Traceback" not in run.said()


@pytest.mark.promise("If a killed rank's child keeps its connections, the others still name it and end within 15 s")
@pytest.mark.parametrize(("point", "victim"), [("train.step_begins", 0), ("train.step_begins", 1), ("save.ends", 0)])
def test_a_killed_rank_that_nobody_is_told_of(point: str, victim: int, bench: Bench) -> None:
    path = bench.recipe("pretrain")
    fault = {"point": point, "nth": 3, "rank": victim, "do": "kill_leaving_a_child", "seconds": 60}
    run = bench.start("pretrain", path, fault=fault)
    run.until(lambda: run.codes()[victim] == -9)
    began = time.monotonic()
    run.until(lambda: run.codes()[1 - victim] is not None, 15)
    assert time.monotonic() - began > SILENT_S - 2, "the death was reported, not noticed by silence"
    assert run.codes()[1 - victim] == 2, run.said()
    assert f"process {victim} (pid {run.pids[victim]} on " in run.said()
    assert "is gone. Continue with --resume auto" in run.said()
    run.kill()
    bench.goes_on("pretrain", path)


@pytest.mark.promise("If a rank raises an error, the others end with its message")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises(rank: int, bench: Bench) -> None:
    path = bench.recipe("pretrain")
    run = bench.start("pretrain", path, fault={"point": "train.step_begins", "nth": 4, "rank": rank, "do": "raise"})
    codes = run.wait(20)
    assert (codes[rank], codes[1 - rank]) == (1, 2), run.said()
    assert f"process {rank} (pid {run.pids[rank]} on " in run.said()
    said = (
        "ended: as MPP_FAULT says" if rank else "is gone"
    )  # without a launcher, process 0 holds the store, which ends with it
    assert said in run.said()
    bench.goes_on("pretrain", path)


@pytest.mark.promise("If a rank dies while another saves, the checkpoint is finished first")
def test_a_killed_rank_beside_one_that_saves(bench: Bench) -> None:
    path, saves = bench.recipe("pretrain"), bench.folder / "run" / "checkpoints"
    slow = {"point": "save.model_written", "nth": 2, "do": "sleep", "seconds": SILENT_S + 5}
    run = bench.start("pretrain", path, fault=slow)
    run.until(lambda: (saves / "step-00000006.tmp").exists())
    os.kill(run.pids[1], signal.SIGKILL)
    assert run.wait(30) == [2, -9], run.said()
    assert checkpoint.broken(saves / "step-00000006") is None
    bench.goes_on("pretrain", path)


@pytest.mark.promise("If a rank hangs, the others end within hang_timeout_s and 10 s, name it and print its stacks")
@pytest.mark.parametrize(
    ("victim", "how"),
    [
        (0, "stop"),
        (1, "sleep"),
        pytest.param(0, "sleep", marks=pytest.mark.exhaustive),
        pytest.param(1, "stop", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("job", ["pretrain", pytest.param("finetune", marks=pytest.mark.exhaustive)])
def test_a_hanging_rank(job: str, victim: int, how: str, nursery: Nursery, shards: Path, folder: Path) -> None:
    path = RECIPES[job](shards, folder / "r.yaml", folder / "run", hang_timeout_s=HANG_TIMEOUT_S)
    out, records = folder / "run", records_of(job, folder / "run")
    fault = {"point": "train.step_begins", "nth": 6, "rank": victim, "do": how, "seconds": 600}
    run = nursery.start(job, path, log=folder / "log", world=2, fault=fault)
    run.until(lambda: steps_logged(records) >= 5)
    began = time.monotonic()
    run.until(lambda: run.codes()[1 - victim] is not None, HANG_TIMEOUT_S + SILENT_S + 5)
    assert run.codes()[1 - victim] == 2, run.said()
    assert time.monotonic() - began < HANG_TIMEOUT_S + 10
    said = run.said()
    run.kill()
    run.wait()
    assert f"process {victim} (pid {run.pids[victim]} on " in said, said
    assert "Traceback" not in said
    if victim == 1:
        assert status(records)["state"] == "failed"
        assert "process 1 (pid" in status(records)["why"]
    stacks = [p.read_text() for p in out.glob("hang-rank*.txt")]
    assert any("loop.py" in s and "in train" in s for s in stacks), stacks


@pytest.mark.promise("If a loader worker is killed, every rank ends in one line; resumed, the run is bit-equal")
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
@pytest.mark.parametrize("job", JOBS)
def test_a_killed_loader_worker(
    job: str, rank: int, nursery: Nursery, shards: Path, folder: Path, reference: Callable[..., Left]
) -> None:
    changes = {"optim.steps": 120, "data.workers": 2, "checkpoint_every_steps": 30}
    if job == "finetune":
        changes["early_stop.every_steps"] = 120
    path, out = RECIPES[job](shards, folder / "r.yaml", folder / "run", **changes), folder / "run"
    records = records_of(job, out)
    run = nursery.start(job, path, log=folder / "log", world=2)
    run.until(lambda: steps_logged(records) >= 40)
    os.kill(children(run.pids[rank])[0], signal.SIGKILL)
    assert run.wait(30) == [2, 2], run.said()
    lines = [text for text in run.said().splitlines() if "data.workers" in text]
    assert any("DataLoader worker" in text and "--resume auto" in text for text in lines), run.said()
    assert "Traceback" not in run.said(), run.said()
    assert status(records)["state"] == "failed"
    nursery.start(job, path, "--resume", "auto", log=folder / "log", world=2).ends_well()
    assert left(out) == reference(job, 2, **changes)


# ---- a loss that is not finite


BLINDING = {"data.mean": [0.0, 0.0, 0.0], "data.std": [1e-37, 1e-37, 1e-37], "optim.warmup_steps": 0}
"""A normalisation that maps a black image to zeros. The squares of any other image are not finite."""


@pytest.fixture
def one_white(folder: Path) -> Path:
    """Return a shard of 47 black images and a white one."""
    images = [encoded(Image.new("RGB", (24, 24), (255,) * 3 if i == 20 else (0,) * 3), "PNG") for i in range(48)]
    return shard_of(folder / "black.tar", images)


def blinded(one_white: Path, folder: Path, name: str, **changes: Any) -> Path:
    plain = {"target": {"name": "pixels"}, "extra_targets": [], "data.held_out": 4, **BLINDING}
    return RECIPES["pretrain"](one_white, folder / f"{name}.yaml", folder / name, **{**plain, **changes})


@pytest.mark.promise("If the loss of a rank is not finite, no rank updates; `mpp replay` repeats the step")
def test_not_finite_on_one_rank(nursery: Nursery, one_white: Path, folder: Path) -> None:
    path, out = blinded(one_white, folder, "run", masks_per_image=2), folder / "run"
    run = nursery.start("pretrain", path, log=folder / "log", world=2)
    assert run.wait() == [2, 2], run.said()
    assert "Traceback" not in run.said(), run.said()
    assert "stopped before the update" in run.said()
    assert status(out)["state"] == "failed"
    (kept,) = (out / "non-finite").iterdir()
    records = [json.loads((kept / f"rank{r}.json").read_text()) for r in range(2)]
    finite = [all(np.isfinite(float(v)) for micro in r["losses"] for v in micro) for r in records]
    assert sorted(finite) == [False, True], "exactly one process must have a loss that is not finite"
    for file in kept.glob("model.safetensors"):
        assert all(t.isfinite().all() for t in load_file(file).values() if t.is_floating_point())
    replayed = nursery.start("replay", out, log=folder / "replay")
    replayed.ends_well()
    said = replayed.said()
    assert "as in the run" in said.splitlines()[-1]
    assert f"process {finite.index(False)}, micro-batch" in said
    assert "loss nan; in the run nan" in said, said
    assert "also by itself: " in said
    assert "image-20.jpg" in said
    assert "  first in " in said, "the module must be named"
    scripted = nursery.start("replay", out, "--json", log=folder / "scripted")
    assert scripted.wait() == [0]
    assert json.loads(scripted.said())["same"] is True
    other = json.loads((kept / "rank0.json").read_text())
    (kept / "rank0.json").write_text(json.dumps({**other, "losses": [["0.125"] for _ in other["losses"]]}))
    another = nursery.start("replay", out, log=folder / "another")
    another.wait()
    assert another.said().splitlines()[-1].endswith("not as in the run: other losses")
    (kept / "rank0.json").write_text(json.dumps(other))
    (kept / "model.safetensors").write_bytes((kept / "model.safetensors").read_bytes()[:-1])
    damaged = nursery.start("replay", out, log=folder / "damaged")
    assert damaged.wait() == [2]
    assert "model.safetensors does not match its checksum" in damaged.said()
    wrong = nursery.start("replay", out, "--step", "999", log=folder / "wrong")
    assert wrong.wait() == [2]
    assert wrong.said() == f"--step 999: not kept; kept steps: {int(kept.name[5:])}\n"


@pytest.mark.promise("If the loss of a rank is not finite, no rank updates; `mpp replay` repeats the step")
def test_not_finite_while_finetuning(nursery: Nursery, shards: Path, folder: Path) -> None:
    changes = {"optim.base_lr": 1e25, "optim.warmup_steps": 0, "optim.clip_grad_norm": None}
    path, out = RECIPES["finetune"](shards, folder / "r.yaml", folder / "run", **changes), folder / "run"
    run = nursery.start("finetune", path, log=folder / "log", world=2)
    assert run.wait() == [2, 2], run.said()
    assert "step 1: loss nan" in run.said()
    assert status(out)["state"] == status(out / "scratch-seed0")["state"] == "failed"
    replayed = nursery.start("replay", out, log=folder / "replay")
    replayed.ends_well()
    said = replayed.said().splitlines()
    assert "as in the run" in said[-1]
    assert sum("loss nan; in the run nan" in text for text in said) == 4, (
        "expected two micro-batches of each of two processes"
    )
    assert any("each image by itself gives such a loss, so the weights are the likely cause" in text for text in said)


@pytest.mark.promise("If only the gradient is not finite, no rank updates, and the step is kept")
def test_a_gradient_that_is_not_finite(bench: Bench) -> None:
    steep = {"extra_targets": [{"target": "pixels", "head": "mlp", "weight": 1e36}]}
    path, out = bench.recipe("pretrain", **steep), bench.folder / "run"
    run = bench.start("pretrain", path)
    assert run.wait() == [2, 2], run.said()
    assert "Traceback" not in run.said(), run.said()
    (kept,) = (out / "non-finite").iterdir()
    losses = [float(v) for r in range(2) for m in json.loads((kept / f"rank{r}.json").read_text())["losses"] for v in m]
    assert all(np.isfinite(losses))
    assert "gradient norm inf: stopped before the update" in run.said()
    bench.start("replay", out, world=1).ends_well()
    assert "as in the run" in bench.log.read_text().splitlines()[-1]


@pytest.mark.promise("Steps that are not finite are skipped on every rank and counted, up to max_skipped_steps")
def test_skipped_steps(nursery: Nursery, one_white: Path, folder: Path) -> None:
    path, out = blinded(one_white, folder, "run", max_skipped_steps=50), folder / "run"
    nursery.start("pretrain", path, log=folder / "log", world=2).ends_well()
    records = read_metrics(out)
    skipped = [m["step"] for m in records if m["loss"] is None]
    assert skipped
    assert records[-1]["skipped_steps"] == len(skipped)
    weights = load_file(out / "encoder" / "model.safetensors")
    assert all(t.isfinite().all() for t in weights.values())
    # killed and resumed: the same steps are skipped, and the weights are equal
    one = blinded(one_white, folder, "one", max_skipped_steps=50)
    fault = {"point": "save.ends", "nth": 3, "do": "kill"}
    assert nursery.start("pretrain", one, log=folder / "log", world=2, fault=fault).wait()[0] == -9
    nursery.start("pretrain", one, "--resume", "auto", log=folder / "log", world=2).ends_well()
    again = load_file(folder / "one" / "encoder" / "model.safetensors")
    assert all(torch.equal(weights[k], again[k]) for k in weights)
    assert [m["loss"] is None for m in read_metrics(folder / "one")] == [m["loss"] is None for m in records]


# ---- shares that do not come out even


@pytest.mark.promise("With few or uneven shards, no run hangs, and each sample is seen at most once an epoch")
@pytest.mark.parametrize("sizes", [[1, 7, 30], [3], [40, 1], [1] * 9, [2]])
@pytest.mark.parametrize(
    ("world", "workers"),
    [(3, 2), *(pytest.param(*other, marks=pytest.mark.exhaustive) for other in ((1, 2), (2, 0)))],
)
def test_shares(
    sizes: list[int],
    world: int,
    workers: int,
    nursery: Nursery,
    folder: Path,
    record_property: Callable[[str, object], None],
) -> None:
    (folder / "shards").mkdir()
    for n, size in enumerate(sizes):
        shard_of(folder / "shards" / f"{n}.tar", [encoded(drawn_image(100 * n + i), "JPEG") for i in range(size)])
    changes = {"data.held_out": 1, "data.workers": workers, "optim.global_batch_size": 12, "optim.steps": 7}
    path = RECIPES["pretrain"](folder / "shards", folder / "r.yaml", folder / "run", **changes)
    nursery.start("pretrain", path, log=folder / "log", world=world, record=folder / "samples").ends_well()
    lines = [tuple(map(int, text.split()[:3])) for text in (folder / "samples").read_text().splitlines()]
    assert sorted(p for p, _, _ in lines) == list(range(7 * 12)), "every position must be trained once"
    samples = {p: (s, r) for p, s, r in lines}
    trained = sum(sizes) - 1
    for epoch in range(7 * 12 // trained):
        of_epoch = [samples[p] for p in range(epoch * trained, (epoch + 1) * trained)]
        assert len(set(of_epoch)) == trained, "every sample must be trained once an epoch"
    record_property("samples", 7 * 12)


@pytest.mark.promise("Too few images for a held-out part are refused in one line on every rank")
def test_one_sample(nursery: Nursery, folder: Path) -> None:
    (folder / "shards").mkdir()
    shard_of(folder / "shards" / "0.tar", [encoded(drawn_image(0), "JPEG")])
    path = RECIPES["pretrain"](folder / "shards", folder / "r.yaml", folder / "run", **{"data.held_out": 1})
    run = nursery.start("pretrain", path, log=folder / "log", world=2)
    assert run.wait() == [2, 2]
    assert "data.held_out is 1, but there are only 1 images" in run.said()
