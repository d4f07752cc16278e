"""Run folders: who may write into one, what may change when a run is resumed, and what a full disk leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mpp
from mpp.errors import MppWarning, UserError
from mpp.runs import checkpoint
from mpp.runs.folder import Lock
from mpp.runs.records import checkpoints_in
from tests.conftest import drawn_image, encoded, pretrain_recipe
from tests.faults.conftest import RECIPES
from tests.faults.processes import JOBS, Job, Left, Nursery, left, records_of, steps_logged
from tests.finetuning.test_finetuning import recipe as finetune_recipe


def stopped(job: Job) -> None:
    for pid in job.pids:
        os.kill(pid, signal.SIGKILL)
    job.wait()


@pytest.mark.promise("A second run into one folder is refused and the first named; a dead run holds no folder")
@pytest.mark.parametrize("job", JOBS)
def test_two_runs_into_one_folder(job: str, nursery: Nursery, shards: Path, folder: Path) -> None:
    path, out = (
        RECIPES[job](shards, folder / "r.yaml", folder / "run", **{"optim.steps": 100000, "data.workers": 2}),
        folder / "run",
    )
    first = nursery.start(job, path, log=folder / "log", world=2)
    first.until(lambda: steps_logged(records_of(job, out)) > 2)
    for words in (["--resume", "auto"], ["--resume", "never"]):
        for world in (1, 2):
            second = nursery.start(job, path, *words, log=folder / "second", world=world)
            assert set(second.wait()) == {2}, second.said()
            said = (folder / "second").read_text()
            (folder / "second").unlink()
            assert len(said.splitlines()) == 1, said
            if words[1] == "auto":
                assert f"out: {out}: process {first.pids[0]} on " in said
    assert json.loads((out / "status.json").read_text())["state"] == "running", "the first run must be unaffected"
    assert None in first.codes()
    stopped(first)  # its workers live a moment longer
    again = nursery.start(job, path, "--resume", "auto", log=folder / "log")
    again.until(
        lambda: (folder / "log").read_text().count("steps; resumed") > 0 or steps_logged(records_of(job, out)) > 5
    )
    stopped(again)


@pytest.mark.promise("A second run into one folder is refused and the first named; a dead run holds no folder")
def test_two_that_begin_at_once(nursery: Nursery, shards: Path, folder: Path) -> None:
    path = RECIPES["pretrain"](shards, folder / "r.yaml", folder / "run", **{"optim.steps": 300})
    runs = [nursery.start("pretrain", path, log=folder / f"log{i}") for i in range(6)]
    codes = [run.wait()[0] for run in runs]
    assert sorted(codes) == [0, 2, 2, 2, 2, 2], [run.said() for run in runs]


@pytest.mark.promise("A second run into one folder is refused and the first named; a dead run holds no folder")
def test_one_process_does_not_lock_itself_out_nor_in(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    lock = Lock(out)
    with pytest.raises(UserError, match="this process is already writing to it"):
        Lock(out)
    lock.release()
    with pytest.raises(UserError, match="stopped before the update"):
        mpp.pretrain(pretrain_recipe(shards, out, **{"optim.base_lr": 1e20, "optim.warmup_steps": 0}))
    Lock(out).release()  # a failed run also releases its lock


@pytest.mark.promise("A changed recipe or data set is refused with the difference; the folder stays unchanged")
@pytest.mark.parametrize("job", JOBS)
def test_what_changed_is_refused(job: str, nursery: Nursery, folder: Path) -> None:
    (folder / "shards").mkdir()
    for n in range(3):
        images = {f"{i:03d}": (encoded(drawn_image(i), "PNG"), str(i % 2)) for i in range(20 * n, 20 * n + 20)}
        labeled_shard(folder / "shards" / f"shard-{n:06d}.tar", images)
    path, out = RECIPES[job](folder / "shards", folder / "r.yaml", folder / "run"), folder / "run"
    nursery.start(job, path, log=folder / "log", world=2).ends_well()
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}

    def refused(*words: str) -> str:
        run = nursery.start(job, path, "--resume", "auto", *words, log=folder / "refused", world=2)
        assert set(run.wait()) == {2}
        said = run.said()
        (folder / "refused").unlink()
        assert {p: p.read_bytes() for p in before} == before
        assert "Traceback" not in said
        return said

    said = refused("optim.base_lr=0.5", "data.image_size=24")
    assert "optim.base_lr: was 0.0" in said
    assert "now 0.5" in said
    assert "data.image_size: was [16, 16], now [24, 24]" in said
    images = {f"{i:03d}": (encoded(drawn_image(90 + i), "PNG"), str(i % 2)) for i in range(21)}
    labeled_shard(folder / "shards" / "shard-000001.tar", images)
    assert "changed since" in refused()


@pytest.mark.promise("A run continues if its data were moved")
@pytest.mark.parametrize("job", JOBS)
def test_data_that_moved(job: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data may be named with a trailing slash, by another path to the same folder, or be copied elsewhere."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image_folder, "photos")
    mpp.pretrain(pretrain_recipe("photos", "p", **{"optim.steps": 3, "checkpoint_every_steps": 1}))

    def go_on(place: str, resume: str = "auto") -> Any:
        if job == "pretrain":
            values = pretrain_recipe(place, "run", **{"optim.steps": 3, "checkpoint_every_steps": 1})
            return mpp.pretrain(values, resume=resume)
        changes = {"data.train": place, "data.val": "photos", "data.labels_per_class": 4, "seeds": [0]}
        changes |= {"optim.steps": 3, "beside": []}
        encoder = "p" if place == "photos" else "./p/"
        return mpp.finetune(finetune_recipe(Path(place), "run", encoder, **changes), resume=resume)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "data.val: .*also in data.train|data.val: the same images", MppWarning)
        assert go_on("photos", "never").state == "finished"
        os.rename("photos", "moved")
        shutil.copytree("moved", "photos")
        for place in ("photos/", "./photos", "moved"):
            assert go_on(place).state == "finished", place
        os.remove("moved/disc/002.jpg")
        with pytest.raises(UserError, match="the data changed since"):
            go_on("moved")


@pytest.mark.promise("The folder of a run that failed before its first result can be used again")
def test_a_run_that_came_to_nothing(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"

    def fails(*_: Any, **__: Any) -> None:
        raise UserError("data.val: a fault that is found late")

    with monkeypatch.context() as patched:
        patched.setattr("mpp.pretraining.setup.load_ahead", fails)
        with pytest.raises(UserError, match="found late"):
            mpp.pretrain(pretrain_recipe(shards, out))
    assert (out / "recipe.yaml").exists()
    shutil.copytree(out, tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="mine is not empty"):
        mpp.pretrain(pretrain_recipe(shards, tmp_path / "mine", **{"optim.steps": 2}))
    corrected = pretrain_recipe(shards, out, **{"optim.base_lr": 0.01, "optim.steps": 2})
    assert mpp.pretrain(corrected).state == "finished"
    for taken in (out, shutil.copytree(out / "encoder", tmp_path / "export")):
        with pytest.raises(UserError, match="is not empty; continue its run with --resume auto"):
            mpp.pretrain(pretrain_recipe(shards, taken, **{"optim.steps": 2}))


@pytest.mark.promise("--overwrite deletes a run, and nothing that is not one or that the new run reads")
def test_overwriting(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = pretrain_recipe(shards, out, **{"optim.steps": 2})
    mpp.pretrain(first)
    (out / "evaluation").mkdir()
    (out / "evaluation" / "recipe.yaml").write_text("job: evaluate\n")
    other = {"optim.steps": 3, "seed": 1}
    needed = "--overwrite: encoder.name: .*/run/encoder is in .*/run, which would be deleted"
    own = {"encoder": {"name": str(out / "encoder")}}
    with pytest.raises(UserError, match=needed):
        mpp.pretrain(pretrain_recipe(shards, out, **other, **own), resume="overwrite")
    assert (out / "encoder" / "config.json").exists()
    (out / "images").symlink_to(shards)
    with pytest.raises(UserError, match="--overwrite: data.shards: .*/run/images is in"):
        mpp.pretrain(pretrain_recipe(out / "images", out, **other), resume="overwrite")
    (out / "images").unlink()
    lock = Lock(out)
    with pytest.raises(UserError, match="is already writing to it"):
        mpp.pretrain(pretrain_recipe(shards, out, **other), resume="overwrite")
    lock.release()
    assert (out / "encoder" / "config.json").exists()
    done = mpp.pretrain(pretrain_recipe(shards, out, **other), resume="overwrite")
    assert (done.state, done.step) == ("finished", 3)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000003"]
    assert not (out / "evaluation").exists()
    assert "seed: 1" in (out / "recipe.yaml").read_text()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for recipe_of_the_user in (False, True):
        if recipe_of_the_user:
            (mine / "recipe.yaml").write_text("job: pretrain\n")
        with pytest.raises(UserError, match="--overwrite: .*mine is not a run folder"):
            mpp.pretrain(pretrain_recipe(shards, mine, **other), resume="overwrite")
    assert (mine / "notes.txt").read_text() == "mine"
    (out / "classes").mkdir()
    for name in ("recipe.yaml", "status.json"):
        shutil.copy(out / name, out / "classes")
    with pytest.raises(UserError, match="--overwrite: .*/run also holds the run .*/run/classes; move it first"):
        mpp.pretrain(pretrain_recipe(shards, out, **other), resume="overwrite")
    assert (out / "encoder" / "config.json").exists()
    new = tmp_path / "new"
    assert mpp.pretrain(pretrain_recipe(shards, new, **other), resume="overwrite").state == "finished"


def labeled_shard(path: Path, images: dict[str, tuple[bytes, str]]) -> None:
    import io
    import tarfile

    with tarfile.open(path, "w") as tar:
        for name, (data, label) in images.items():
            for suffix, content in (("png", data), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.promise("A checkpoint of another format is refused with both version numbers")
def test_another_format(nursery: Nursery, shards: Path, folder: Path) -> None:
    path, out = RECIPES["pretrain"](shards, folder / "r.yaml", folder / "run"), folder / "run"
    nursery.start("pretrain", path, log=folder / "log").ends_well()
    for step in checkpoints_in(out / "checkpoints"):
        state = json.loads((step / "state.json").read_text())
        (step / "state.json").write_text(json.dumps({**state, "format": 1}))
        manifest = json.loads((step / checkpoint.MANIFEST).read_text())
        manifest["state.json"] = checkpoint._sha256(step / "state.json")
        (step / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    run = nursery.start("pretrain", path, "--resume", "auto", log=folder / "again", world=2)
    assert set(run.wait()) == {2}
    assert f"checkpoint format 1; this version reads {checkpoint.FORMAT}" in run.said()
    assert len(run.said().splitlines()) == 1


# ---- no space, no permission


def unsaved_run(
    job: str, way: str, policy: str, nursery: Nursery, shards: Path, folder: Path, place: Path
) -> tuple[Job, Path, Callable[..., Job]]:
    """Resume a killed run that has two checkpoints, in a place that has no room for another.

    Returns:
        The resumed job, the run folder, and a function that resumes the run once more.
    """
    changes: dict[str, Any] = {"if_unsaved": policy, "optim.steps": 14}
    path, out = RECIPES[job](shards, folder / "r.yaml", place / "run", **changes), place / "run"
    fault = {"point": "save.ends", "nth": 3, "do": "kill"}
    assert nursery.start(job, path, log=folder / "log", world=2, fault=fault).wait()[0] == -9
    options: dict[str, Any] = {}
    if way == "full":
        free = shutil.disk_usage(place).free
        (place / "filler").write_bytes(bytes(free - 40_000))
    elif way == "quota":
        options["file_bytes"] = 40_000
    else:
        checkpoints = records_of(job, out) / "checkpoints"
        checkpoints.chmod(0o555)
        options["bound_by_modes"] = True

    def go_on(**more: Any) -> Job:
        return nursery.start(job, path, "--resume", "auto", log=folder / "again", world=2, **options, **more)

    return go_on(), out, go_on


@pytest.mark.promise("On a full disk, quota or read-only folder, checkpoints stay; path and free space are named")
@pytest.mark.parametrize("policy", ["stop", "go_on"])
@pytest.mark.parametrize("way", ["full", "quota", "read-only"])
@pytest.mark.parametrize("job", ["pretrain", pytest.param("finetune", marks=pytest.mark.exhaustive)])
def test_a_checkpoint_that_cannot_be_written(
    job: str,
    way: str,
    policy: str,
    nursery: Nursery,
    shards: Path,
    folder: Path,
    small_disk: Path,
    reference: Callable[..., Left],
) -> None:
    run, out, _ = unsaved_run(job, way, policy, nursery, shards, folder, small_disk)
    codes, said = run.wait(), run.said()
    assert set(codes) == {2}, said
    assert "Traceback" not in said, said
    saves = records_of(job, out) / "checkpoints"
    if way == "read-only":
        saves.chmod(0o755)
    line = next(text for text in said.splitlines() if "cannot be saved" in text)
    assert f"{saves}/step-000000" in line
    assert "GB free there" in line
    assert [checkpoint.broken(p) for p in checkpoints_in(saves)] == [None, None], (
        "the earlier checkpoints must be intact"
    )
    assert not list(saves.glob("*.tmp")), "the failed checkpoint must leave nothing"
    assert ("the run continues because of if_unsaved" in said) == (policy == "go_on")
    last = max(
        json.loads(text)["step"]
        for text in (records_of(job, out) / "metrics.jsonl").read_text().splitlines()
        if text.endswith("}")
    )
    if way != "full":  # on a full disk, lines of the metrics wait for space
        assert last == (14 if policy == "go_on" else 12 if job == "pretrain" else 9)
    (small_disk / "filler").unlink(missing_ok=True)
    path = folder / "r.yaml"
    nursery.start(job, path, "--resume", "auto", log=folder / "log", world=2).ends_well()
    assert left(out) == reference(job, 2, **{"optim.steps": 14})


@pytest.mark.promise("An output folder that cannot be written is refused before the first step")
@pytest.mark.parametrize("job", JOBS)
def test_a_place_that_cannot_be_written(job: str, nursery: Nursery, shards: Path, folder: Path) -> None:
    (folder / "closed").mkdir(mode=0o555)
    path = RECIPES[job](shards, folder / "r.yaml", folder / "closed" / "run")
    run = nursery.start(job, path, log=folder / "log", world=2, bound_by_modes=True)
    assert set(run.wait()) == {2}
    assert run.said() == f"out: {folder}/closed/run: Permission denied\n"
