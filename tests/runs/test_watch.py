"""`mpp watch`, and the reading of run folders."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import mpp
from mpp.cli.app import main
from mpp.errors import UserError
from mpp.runs.history import read_run, settings_that_differ
from mpp.runs.watch import standing
from tests.conftest import ROOT, pretrain_values
from tests.conftest import pretrain_recipe as recipe_of


def run_of(folder: Path, **parts: Any) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text("job: pretrain\nencoder: {name: vit}\n")
    status = {"state": "running", "steps": 1000, "host": platform.node(), "pid": os.getpid(), "step": 0}
    (folder / "status.json").write_text(json.dumps({**status, **parts.get("status", {})}))
    lines = parts.get("metrics", [])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines) + parts.get("torn", ""))
    return folder


LINES = [
    {"step": s, "seen": 16 * s, "loss": 1.0 - s / 1000, "images_per_s": 160.0, "data_wait": 0.02} for s in (100, 200)
]


def test_a_running_job(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", metrics=LINES, torn='{"step": 300, "se')
    (run / "checkpoints" / "step-00000100").mkdir(parents=True)
    now = (run / "metrics.jsonl").stat().st_mtime + 20
    text, going = standing(run, now)
    assert going
    assert f"{run}: running, step 200 of 1,000 (20%), about 1:00 left" in text, "800 steps at 10 per second, less 20 s"
    assert "loss 0.8  images/s 160  data wait 2%" in text
    assert "last checkpoint: step 100, 20 s ago" in text
    assert "nothing written" not in text
    text, _ = standing(run, now + 400)
    assert "nothing written for 7:00: it may hang, or be gone" in text


def test_a_job_whose_process_is_gone(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    text, going = standing(run_of(tmp_path / "run", metrics=LINES, status={"pid": gone.pid}))
    assert not going
    assert "status.json says running, but process" in text


@pytest.mark.slow
def test_a_real_job_is_watched_to_its_end(shards: Path, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "recipe.yaml"
    values = pretrain_values(shards, tmp_path / "run", **{"optim.steps": 400, "log_every_steps": 10})
    path.write_text(yaml.safe_dump(values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        [sys.executable, "-m", "mpp", "pretrain", str(path)], env=environment, stdout=subprocess.DEVNULL
    )
    seen = set()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (tmp_path / "run" / "status.json").exists():
            text, going = standing(tmp_path / "run")
            seen.add(text.split(",")[0].rpartition(" ")[2])
            if not going and "finished" in text:
                break
        time.sleep(0.05)
    assert job.wait() == 0
    assert seen >= {"running", "finished"}
    done = CliRunner().invoke(main, ["watch", str(tmp_path / "run"), "--every", "0.1"])
    assert done.exit_code == 0
    assert "finished, step 400 of 400 (100%)" in done.output


def test_a_fine_tune_is_told_by_its_trials(shards: Path, tmp_path: Path) -> None:
    from mpp.recipe.finetune import FinetuneRecipe
    from mpp.recipe.loading import check_recipe

    values = {
        "job": "finetune", "out": str(tmp_path / "ft"), "encoder": "scratch", "seeds": [0, 1],
        "architecture": {"name": "vit_tiny_patch16_224", "args": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}},
        "data": {"train": str(shards), "val": str(shards), "image_size": 16, "workers": 0, "labels_per_class": 2},
        "optim": {"steps": 2, "global_batch_size": 4},
    }  # fmt: skip
    with pytest.warns(mpp.MppWarning, match="the same images"):
        mpp.finetune(check_recipe(values, FinetuneRecipe))
    assert "finished, 2 of 2 models done" in standing(tmp_path / "ft")[0]
    (tmp_path / "ft" / "scratch-seed1" / "result.json").unlink()
    status = json.loads((tmp_path / "ft" / "status.json").read_text())
    running = {**status, "state": "running", "host": platform.node(), "pid": os.getpid()}
    (tmp_path / "ft" / "status.json").write_text(json.dumps(running))
    text, going = standing(tmp_path / "ft")
    assert going
    assert "running, 1 of 2 models done" in text
    assert "scratch-seed1: finished, step 2 of 2" in text

    (tmp_path / "ft" / "status.json").write_text(json.dumps({**status, "state": "failed", "why": "no space left"}))
    assert "warning: It ended: no space left." in standing(tmp_path / "ft")[0], "it ended between two trials"
    (tmp_path / "ft" / "scratch-seed1" / "status.json").write_text("")
    assert "scratch-seed1: not begun" in standing(tmp_path / "ft")[0], "a power failure may leave an empty file"


def test_errors() -> None:
    done = CliRunner().invoke(main, ["watch", "/none"])
    assert (done.exit_code, done.output) == (2, "/none: no such file or folder\n")


# ---- history


def test_hours_leave_out_the_time_between_runs(tmp_path: Path) -> None:
    found = read_run(run_of(tmp_path / "run", metrics=LINES))
    assert found.hours() == pytest.approx([1600 / 160 / 3600, 3200 / 160 / 3600])
    assert found.series("loss") == ([100, 200], [0.9, 0.8])
    assert found.last("skill") is None
    assert found.setting("encoder.name") == "vit"
    assert found.setting("encoder.nothing", 3) == 3


def test_keys_that_differ(shards: Path, tmp_path: Path) -> None:
    from mpp.runs.folder import create_run

    runs = []
    for name, changes in (("a", {}), ("b", {"mask": "block", "optim.steps": 30})):
        create_run(recipe_of(shards, tmp_path / name, **changes))
        runs.append(read_run(tmp_path / name))
    found = dict(settings_that_differ(runs))
    assert found["optim.steps"] == ["20", "30"]
    assert found["mask.name"] == ["uniform", "block"]
    assert "out" not in found
    assert "data.shards" not in found


def test_the_run_whose_encoder_was_read(tmp_path: Path) -> None:
    for source, wanted in (
        ("no-such/a", Path("no-such/a")),
        ("no-such/a/encoder", Path("no-such/a")),
        ("scratch", None),
    ):
        folder = tmp_path / source.replace("/", "-")
        folder.mkdir()
        (folder / "recipe.yaml").write_text(f"job: finetune\nencoder: {source}\n")
        assert read_run(folder).made_with() == wanted
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "recipe.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="not the recipe of a run"):
        read_run(tmp_path / "odd")


def test_the_pace_is_images_over_time(tmp_path: Path) -> None:
    lines = [{"step": s, "seen": 1000 * s, "images_per_s": r} for s, r in ((1, 1000.0), (2, 1000.0), (3, 10.0))]
    run = run_of(tmp_path / "run", metrics=lines, status={"steps": 5})
    text, _ = standing(run, (run / "metrics.jsonl").stat().st_mtime)
    assert "about 1:41 left" in text, "two steps are left, and the last two took 101 s"
    one = run_of(tmp_path / "one", metrics=LINES[:1])
    (one / "recipe.yaml").write_text("job: pretrain\nlog_every_steps: 500\n")
    assert "nothing written" not in standing(one, (one / "metrics.jsonl").stat().st_mtime + 90)[0]
    text, _ = standing(one, (one / "metrics.jsonl").stat().st_mtime + 5 * 3600)
    assert "nothing written for 5:00:00" in text, "it hung after its first line"
    assert "left" not in text, "one line does not tell the time that is left"


DAMAGES: dict[str, Any] = {
    "metrics.jsonl": [b"\xff\xfe", b'{"step": "a", "seen": 3}', b'{"step": 1}', b"[1]", b'{"step": 1, "seen": 2, "skill": "x"}'],
    "status.json": [b"[]", b'{"state": "running", "pid": null}', b'{"state": "failed", "step": "x", "steps": []}', b"{"],
    "result.json": [b'{"verdicts": null}', b'{"verdicts": [1]}', b'{"best": [], "scores": 3}', b'{"verdicts": [{"gain": 1}]}'],
    "env.json": [b"3", b'{"devices": 3, "processes": "x", "packages": 4}'],
    "data.json": [b'{"val_in_train": 3, "images": "x"}', b'{"val_in_train": {"shared": 2}}', b'{"images": 3}'],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("job", ["pretrain", "finetune", "evaluate"])
@pytest.mark.parametrize(("name", "content"), [(n, c) for n, found in DAMAGES.items() for c in found])
def test_damaged_records_are_no_traceback(job: str, name: str, content: bytes, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", metrics=LINES)
    (run / "recipe.yaml").write_text(f"job: {job}\nencoder: vit\nseeds: [0]\n")
    (run / "result.json").write_text('{"verdicts": [], "best": {}}')
    (run / name).write_bytes(content)
    for words in (["watch", str(run)], ["report", str(run)]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, (done.output, done.exception)
    assert "What was run" in (run / "report.html").read_text() or "damaged" in (run / "report.html").read_text()


def test_a_recipe_that_is_none(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    for text in ("3", "job: [1]", "job: cook", "- job: pretrain"):
        (run / "recipe.yaml").write_text(text)
        with pytest.raises(UserError, match="not the recipe of a run"):
            read_run(run)
