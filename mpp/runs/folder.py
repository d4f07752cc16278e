"""Open run folders: lock one for writing, and find the checkpoint to continue from."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mpp.errors import UserError
from mpp.parallel.team import Team
from mpp.recipe.dump import dump_recipe, settings_of
from mpp.recipe.loading import load_recipe
from mpp.recipe.resume import asks_for_longer, differences, length_of
from mpp.recipe.sections import Job
from mpp.runs import checkpoint
from mpp.runs.records import RECIPE, checkpoints_in, is_checkpoint, read_status, write_status

DATA = "data.json"
LOCK = ".lock"
RECORDS = (RECIPE, DATA, "env.json", "status.json", "train.log", "metrics.jsonl")
"""Files that a run may write before its first step is done."""
_held: set[Path] = set()
"""Folders that this process writes into. It needs this list because the system's locks only exclude other processes."""


@dataclass(frozen=True)
class OpenRun:
    """A run folder that this run may write into."""

    out: Path
    checkpoint: Path | None
    """Checkpoint to continue from; None means that the run starts from step 0."""


@contextmanager
def opened(team: Team, recipe: Job, resume: str, *, fingerprint: str) -> Iterator[OpenRun]:
    """Open the run folder of a recipe; a context manager.

    The main process makes the folder and locks it until the context ends. All processes get the result.

    Args:
        team: The processes.
        recipe: Recipe whose `out` is the run folder.
        resume: "never", "auto", "overwrite" (delete the run in the folder), or the folder of a checkpoint.
        fingerprint: Fingerprint of the data.

    Raises:
        UserError: If the folder holds another run, the recipe or data changed, or another process writes into the
            folder. It is raised on every process.
    """
    lock: Lock | None = None

    def open_it() -> OpenRun:
        nonlocal lock
        out, begin = Path(recipe.out), resume
        if resume == "overwrite":
            if out.is_dir() and any(out.iterdir()):
                _check_may_be_deleted(out, recipe)
                lock = Lock(out)
                _delete_run(out)
            begin = "never"
        if not (out / RECIPE).exists():  # if it is not a run folder, refuse it before anything is written there
            find_run(recipe, begin, fingerprint=fingerprint)
        lock = lock or Lock(out)
        run = find_run(recipe, begin, fingerprint=fingerprint)  # again: another process may have been faster
        outdated, longer = _of_shorter_run(out, recipe), _asks_for_longer(out, recipe)
        if outdated or longer:
            _set_encoder_aside(out, run)
        if begin != "auto" or read_status(out) != "finished" or longer or _asks_for_more(out, recipe):
            create_run(recipe)  # else recipe.yaml of a finished run stays unchanged
        for path in outdated:
            checkpoint.remove(path)
        return run

    try:
        yield team.on_main(open_it)
    finally:
        if lock:
            lock.release()


class Lock:
    """The lock of a run folder that this process writes into. The system releases it however the process ends.

    It is a record lock. The loader's workers, which may outlive the process for some seconds, do not inherit it.

    Args:
        out: The run folder, which is made if it does not exist.

    Raises:
        UserError: If another process holds the lock, or the lock cannot be made.
    """

    def __init__(self, out: Path) -> None:
        self.out = out.absolute()
        if self.out in _held:  # opening and closing the file a second time would release the lock
            raise UserError(f"out: {out}: this process is already writing to it; choose another folder")
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"out: {out}: {error.strerror}") from error
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 1000, 0)
            os.close(self._fd)
            raise UserError(f"out: {out}: {_said(holder)} is writing to it; wait, or choose another folder") from None
        except OSError as error:
            os.close(self._fd)
            raise UserError(f"out: {out}: its file system has no locks: {error.strerror}") from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps({"host": platform.node(), "pid": os.getpid()}).encode(), 0)
        _held.add(self.out)

    def release(self) -> None:
        _held.discard(self.out)
        os.close(self._fd)


def _said(holder: bytes) -> str:
    try:
        owner = json.loads(holder)
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _check_may_be_deleted(out: Path, recipe: Job) -> None:
    """Check that a folder is that of one run, and that the new run reads nothing in it.

    Raises:
        UserError: If it is not, or does.
    """
    if not (out / RECIPE).exists() or not read_status(out):
        raise UserError(f"--overwrite: {out} is not a run folder ({RECIPE} with status.json); give another folder")
    for nested in sorted(path.parent for path in out.rglob("status.json")):
        if nested not in (out, out / "evaluation") and (nested / RECIPE).exists():
            raise UserError(f"--overwrite: {out} also holds the run {nested}; move it first")
    for key, value in settings_of(recipe).items():
        for place in value if isinstance(value, list | tuple) else [value]:
            if key == "out" or not isinstance(place, str) or not os.path.lexists(place):
                continue
            # Both the link and what it points to are needed.
            for path, folder in ((Path(place).absolute(), out.absolute()), (Path(place).resolve(), out.resolve())):
                if path.is_relative_to(folder):
                    raise UserError(f"--overwrite: {key}: {place} is in {out}, which would be deleted; change out")


def _delete_run(out: Path) -> None:
    """Delete everything in a run folder but its lock.

    The status says "failed" from the beginning, and is deleted last with the recipe. So if this is interrupted, the
    folder counts neither as that of a finished run nor as that of none.

    Raises:
        UserError: If something cannot be deleted.
    """
    try:
        write_status(out, "failed", why="the run was being deleted by --overwrite")
        last = {name: 1 + i for i, name in enumerate((DATA, "status.json", RECIPE))}
        for path in sorted(out.iterdir(), key=lambda path: last.get(path.name, 0)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    except OSError as error:
        raise UserError(f"--overwrite: {error.filename or out}: {error.strerror}") from error


def find_run(recipe: Job, resume: str, *, fingerprint: str) -> OpenRun:
    """Check the run folder of a recipe, and find the checkpoint to continue from. Nothing is written.

    Args:
        recipe: Recipe whose `out` is the run folder.
        resume: "never", "auto" or the folder of a checkpoint.
        fingerprint: Fingerprint of the data.

    Raises:
        UserError: If the folder holds another run, the recipe or data changed, or the checkpoint is unusable.
    """
    if not isinstance(resume, str | os.PathLike):
        raise UserError(f"--resume: expected auto, never, or the folder of a checkpoint; got {resume!r}")
    out = Path(recipe.out)
    try:
        others = sorted(p.name for p in out.iterdir() if p.name != LOCK) if out.exists() else []
    except OSError as error:
        raise UserError(f"out: {out}: {error.strerror}") from error
    if RECIPE in others and _is_unused(out):
        others = []  # the records of an unused run are replaced
    if others and resume == "never":
        raise UserError(f"out: {out} is not empty; continue its run with --resume auto, or choose another folder")
    if others and RECIPE not in others:
        raise UserError(f"out: {out} is not a run folder (no {RECIPE}); give another folder")
    path = None if resume in ("never", "auto") else Path(resume)
    if others:
        _same_recipe(out, recipe)
        _same_data(out, fingerprint)
        path = path or checkpoint.newest(out / "checkpoints", length=length_of(recipe))
        if path is None and (out / "encoder").exists():
            raise UserError(f"out: {out} has its encoder but no checkpoint to continue from; choose another folder")
    elif path is not None and (path.parent.parent / RECIPE).exists():
        _same_recipe(path.parent.parent, recipe)
    if path is not None:
        if not path.is_dir() or not is_checkpoint(path):
            raise UserError(
                f"--resume {path}: no such checkpoint; expected auto, never, or a folder such as "
                f"{out}/checkpoints/step-00001000"
            )
        fault = checkpoint.broken(path)
        if fault:
            raise UserError(f"--resume {path}: {fault}")
        state = checkpoint.read_state(path)
        if "data_fingerprint" not in state:  # it is a step that was kept for `mpp replay`
            raise UserError(f"--resume {path}: no checkpoint to continue from; use auto, or one of {out}/checkpoints")
        if others and not checkpoint.fits_length(state, length_of(recipe)):
            raise UserError(f"--resume {path}: the learning rate had fallen by then; a longer run needs an earlier one")
        if state["data_fingerprint"] != fingerprint:
            raise UserError(f"{path}: the data changed since (shards, their sizes or their images); start a new run")
    return OpenRun(out, path)


def _is_unused(out: Path) -> bool:
    """Return whether a run ended before it wrote a checkpoint, a result or a line of metrics.

    If so, there is nothing to continue from, and a corrected recipe may use the folder. A folder with any other files
    is not unused. A run in progress is protected by its lock.
    """
    if read_status(out) == "finished":
        return False
    for path in out.rglob("*"):
        features = path.relative_to(out).parts[0] == "arms" and path.suffix == ".npy"  # an evaluation reads them again
        if path.is_dir() or path.parent == out / "reconstructions" or features:
            continue
        if path.name not in (*RECORDS, LOCK) or (path.name == "metrics.jsonl" and path.stat().st_size):
            return False
    return True


def _same_recipe(run: Path, recipe: Job) -> None:
    changed = differences(load_recipe(run / RECIPE, type(recipe)), recipe)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise UserError(
            f"out: {run} was created with a different recipe; choose another folder, or restore these values:\n{lines}"
        )


def _asks_for_longer(run: Path, recipe: Job) -> bool:
    return (run / RECIPE).exists() and asks_for_longer(load_recipe(run / RECIPE, type(recipe)), recipe)


def _of_shorter_run(run: Path, recipe: Job) -> list[Path]:
    """Return the checkpoints of a run that was shorter, from the part in which its learning rate had fallen."""
    length, found = length_of(recipe), []
    for path in checkpoints_in(run / "checkpoints"):
        with suppress(UserError):  # an unreadable state
            if not checkpoint.fits_length(checkpoint.read_state(path), length):
                found.append(path)
    return found


def _set_encoder_aside(run: Path, begins: OpenRun) -> None:
    """Rename the encoder of a run that is made longer after its last step, and delete later pictures.

    The encoder would otherwise be taken for that of the longer run, before this has ended.
    """
    last = checkpoints_in(run / "checkpoints")
    if last and (run / "encoder").exists():
        aside = run / f"encoder-{last[0].name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(run / "encoder", aside)
    step = checkpoint.read_state(begins.checkpoint)["step"] if begins.checkpoint else 0
    for picture in (run / "reconstructions").glob("step-*.png"):
        if int(picture.stem.removeprefix("step-")) > step:
            picture.unlink()


def _asks_for_more(run: Path, recipe: Job) -> bool:
    """Return whether a recipe has other seeds or approaches than a finished run. If so, its recipe.yaml is replaced."""
    before, now = settings_of(load_recipe(run / RECIPE, type(recipe))), settings_of(recipe)
    return any(before.get(key) != now.get(key) for key in ("seeds", "beside"))


def _same_data(run: Path, fingerprint: str) -> None:
    """Compare the data's fingerprint with that in data.json, which exists even before the first checkpoint.

    Raises:
        UserError: If the fingerprints differ.
    """
    try:
        before = json.loads((run / DATA).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before != fingerprint:
        raise UserError(f"{run}: the data changed since (images, labels or a trained encoder); start a new run")


def create_run(recipe: Job) -> None:
    """Make the run folder and write the resolved recipe into it, atomically.

    Raises:
        UserError: If the folder cannot be written.
    """
    out = Path(recipe.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / f"{RECIPE}.tmp"
        temporary.write_text(dump_recipe(recipe), encoding="utf-8")
        os.replace(temporary, out / RECIPE)
    except OSError as error:
        raise UserError(f"out: {out}: {error.strerror}") from error
