"""A run that is killed anywhere and resumed has the losses and weights of an undisturbed run, bit by bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpp.runs import checkpoint
from mpp.runs.records import checkpoints_in, read_metrics
from tests.faults.conftest import RECIPES, Bench
from tests.faults.processes import JOBS, records_of, steps_logged

SAVING = [
    "save.begins", "save.folder_made", "save.model_written", "save.averaged_written", "save.optimizer_written",
    "save.state_written", "save.files_synced", "save.manifest_written", "save.before_rename", "save.renamed",
    "prune.before", "prune.inside", "prune.after", "save.ends", "export.written", "export.before_rename",
    "export.renamed",
]  # fmt: skip
EXHAUSTIVE = pytest.mark.exhaustive
WRITTEN = [p for p in SAVING if p.endswith("_written")]
LOADING = ["load.begins", "load.model_read", "load.ends", "load.metrics_kept", "load.metrics_rewound"]
ONCE = ("export.written", "export.before_rename", "export.renamed")
NOT_IN = {"pretrain": {"save.averaged_written"}, "finetune": set()}
FEW = {"save.model_written", "save.before_rename", "prune.inside", "load.model_read"}
"""Points at which fine-tuning, the second rank and the third checkpoint are tried after every change.

`make faults` tries them at all points.
"""


def at_points(points: list[str], others: tuple[int, int]) -> list[Any]:
    """Return (job, point, other) for both jobs and both others.

    Outside `FEW`, only pretraining with the first other is tried after every change.
    """
    return [
        pytest.param(job, p, other, marks=() if p in FEW or (job, other) == ("pretrain", others[0]) else EXHAUSTIVE)
        for job in JOBS
        for p in points
        for other in others
        if p not in NOT_IN[job]
    ]


@pytest.mark.promise("Every point at which these tests break a run is one that real runs reach")
@pytest.mark.parametrize("job", JOBS)
def test_the_points_are_those_that_are_reached(job: str, bench: Bench) -> None:
    path, trace = bench.recipe(job), bench.folder / "trace"
    env = {"MPP_FAULT_TRACE": str(trace)}
    fault = {"point": "save.ends", "nth": 2, "do": "kill"}
    assert bench.start(job, path, world=1, env=env, fault=fault).wait() == [-9]
    bench.start(job, path, "--resume", "auto", world=1, env=env).ends_well()
    reached = {line.split()[1] for line in trace.read_text().splitlines()}
    assert reached == {*SAVING, *LOADING, "train.step_begins"} - NOT_IN[job]


@pytest.mark.promise("kill -9 of either rank at any point of saving: resumed, losses and weights are bit-equal")
@pytest.mark.parametrize(("job", "point", "victim"), at_points(SAVING, (0, 1)))
def test_killed_while_saving(job: str, point: str, victim: int, bench: Bench) -> None:
    path = bench.recipe(job)
    fault = {"point": point, "nth": 1 if point in ONCE else 2, "do": "kill", "victim": victim}
    killed = bench.start(job, path, fault=fault)
    codes = killed.wait()
    assert codes[victim] == -9, killed.said()
    if point != "export.renamed":  # nothing is exchanged afterwards
        assert codes[1 - victim] == 2, killed.said()
        assert f"process {victim} (pid" in killed.said()
        assert "Traceback" not in killed.said()
    bench.count("kills", 1)
    bench.goes_on(job, path)


@pytest.mark.promise("kill -9 while a file is written: resumed, losses and weights are bit-equal")
@pytest.mark.parametrize(("job", "point", "nth"), at_points(WRITTEN, (1, 3)))
def test_killed_inside_a_file(job: str, point: str, nth: int, bench: Bench) -> None:
    path = bench.recipe(job)
    fault = {"point": point, "nth": nth, "do": "halve"}
    assert bench.start(job, path, fault=fault).wait()[0] == -9
    bench.count("kills", 1)
    bench.goes_on(job, path)


@pytest.mark.promise("kill -9 while resuming, twice: at the third start, losses and weights are bit-equal")
@pytest.mark.parametrize(("job", "point", "victim"), at_points(LOADING, (0, 1)))
def test_killed_while_loading(job: str, point: str, victim: int, bench: Bench) -> None:
    path = bench.recipe(job)
    first = {"point": "save.manifest_written", "nth": 3, "do": "halve"}
    assert bench.start(job, path, fault=first).wait()[0] == -9
    fault = {"point": point, "do": "kill", "victim": victim}
    again = bench.start(job, path, "--resume", "auto", fault=fault)
    assert again.wait()[victim] == -9, again.said()
    bench.count("kills", 2)
    bench.goes_on(job, path)


@pytest.mark.promise("kill -9 of random ranks at random moments, repeated: losses and weights are bit-equal")
@pytest.mark.parametrize("times", [6, pytest.param(20, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("job", ["pretrain", pytest.param("finetune", marks=pytest.mark.exhaustive)])
def test_killed_at_random(job: str, times: int, bench: Bench) -> None:
    changes = {"optim.steps": 20 * times, "checkpoint_every_steps": 5, "data.workers": 1}
    if job == "finetune":
        changes["early_stop.every_steps"] = 10 * times
    path, out = bench.recipe(job, **changes), bench.folder / "run"
    rng, kills = random.Random(7), 0
    records = records_of(job, out)
    while kills < times:
        run = bench.start(job, path, "--resume", "auto")
        # each time the run gets a little further, and some runs are killed before they train
        goal = steps_logged(records) + rng.randint(1, 15) if rng.random() < 0.8 else 0
        run.until(lambda goal=goal: steps_logged(records) >= goal)
        time.sleep(rng.random() * 0.1)
        os.kill(run.pids[rng.randrange(2)], signal.SIGKILL)
        assert -9 in run.end_with_the_first(), run.said()
        kills += 1
    bench.count("kills", kills)
    assert steps_logged(records) < 20 * times, "the run must be killed before it ends"
    bench.goes_on(job, path, **changes)


@pytest.mark.promise("Resumed on 1 to 3 processes, 0 or 2 workers: same samples, crops and masks; losses to 1e-5")
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 2), (3, 0), (3, 2)])
def test_resumed_on_other_processes(world: int, workers: int, bench: Bench) -> None:
    # drop path is drawn for each micro-batch, and the micro-batches change with the processes
    changes: dict[str, Any] = {"encoder.args.drop_path_rate": 0.0, "optim.global_batch_size": 12}
    path = bench.recipe("pretrain", **changes, **{"data.workers": workers})
    fault = {"point": "save.ends", "nth": 2, "do": "kill"}
    record = bench.folder / "samples"
    assert bench.start("pretrain", path, fault=fault, record=record).wait()[0] == -9
    # samples of repeated steps count once, because kills do not fall between two steps
    done = [line for line in record.read_text().splitlines() if int(line.split()[0]) < 6 * 12]
    record.unlink()
    again = bench.start("pretrain", path, "--resume", "auto", world=world, record=record)
    again.ends_well()
    whole = bench.folder / "whole"
    one = RECIPES["pretrain"](bench.shards, bench.folder / "one.yaml", bench.folder / "one", **changes)
    bench.start("pretrain", one, world=1, record=whole).ends_well()
    assert sorted(done + record.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    bench.count("samples compared", 12 * 12)
    assert "resumed at step 6" in bench.log.read_text()
    expected = bench.reference("pretrain", 1, **changes).losses["metrics.jsonl"]
    found = [m["loss"] for m in read_metrics(bench.folder / "run")]
    np.testing.assert_allclose(found, [float.fromhex(v) for _, v in expected], rtol=1e-5)


def damaged(path: Path, how: str) -> str:
    """Damage a checkpoint, and return what the warning must contain."""
    if how == "missing":
        import shutil

        shutil.rmtree(path)
        return ""
    name = {"manifest": checkpoint.MANIFEST}.get(how, "model.safetensors")
    file = path / name
    data = bytearray(file.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    elif how == "truncated":
        data = data[: len(data) // 2]
    elif how == "manifest":
        data = data[:20]
    else:
        file.unlink()
        return f"{path.name}: {name} is missing"
    file.write_bytes(data)
    return f"{path.name}: {name} " + (
        "is missing or unreadable" if how == "manifest" else "does not match its checksum"
    )


@pytest.mark.promise("If the newest checkpoint is damaged, it is named and the one before is used")
@pytest.mark.parametrize("how", ["truncated", "flipped", "file removed", "manifest", "missing"])
@pytest.mark.parametrize("job", JOBS)
def test_a_damaged_checkpoint(job: str, how: str, bench: Bench) -> None:
    path = bench.recipe(job)
    fault = {"point": "save.ends", "nth": 3, "do": "kill"}
    assert bench.start(job, path, fault=fault).wait()[0] == -9
    inner = records_of(job, bench.folder / "run") / "checkpoints"
    newest, before = checkpoints_in(inner)
    warning = damaged(newest, how)
    if job == "pretrain" and warning and how != "manifest":  # asked for by name, it is refused
        asked = bench.start(job, path, "--resume", newest, world=1)
        assert asked.wait() == [2]
        assert f"--resume {newest}: {warning.partition(': ')[2]}" in bench.log.read_text()
        bench.log.unlink()
    bench.goes_on(job, path)
    said = bench.log.read_text()
    assert f"resumed at step {int(before.name[5:])}" in said
    if warning:
        assert f"{warning}; the checkpoint before it is used" in said
        assert said.count(warning) == 1, "only one process must print the warning"
