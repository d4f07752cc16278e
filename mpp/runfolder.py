"""Run folders: who may write into one, and from which checkpoint a run goes on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mpp import checkpoint
from mpp.errors import UserError
from mpp.recipe import Job, differences, dump_recipe, load_recipe

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class OpenRun:
    """A run folder that may be written."""

    out: Path
    checkpoint: Path | None
    """Where to go on from; None: from the start."""


def find_run(recipe: Job, resume: str, *, fingerprint: str) -> OpenRun:
    """Check the run folder of `recipe`; nothing is written, so every process may ask at once.

    resume: "never", "auto" or a checkpoint's folder. UserError where the folder holds another run, or where
    recipe or data changed since.
    """
    if not isinstance(resume, str | os.PathLike):
        raise UserError(f"resume: {resume!r}; allowed: auto, never, or the folder of a checkpoint")
    out = Path(recipe.out)
    try:
        others = sorted(p.name for p in out.iterdir()) if out.exists() else []
    except OSError as error:
        raise UserError(f"out: {out}: {error.strerror}") from error
    if others and resume == "never":
        raise UserError(f"out: {out} is not empty; go on with --resume auto, or give another folder")
    if others and RECIPE not in others:
        raise UserError(f"out: {out} is not a run folder (no {RECIPE}); give another folder")
    path = None if resume in ("never", "auto") else Path(resume)
    if others:
        _same_recipe(out, recipe)
        path = path or checkpoint.newest(out / "checkpoints")
        if path is None and (out / "encoder").exists():
            raise UserError(f"out: {out} has its encoder but no checkpoint to go on from; give another folder")
    elif path is not None and (path.parent.parent / RECIPE).exists():
        _same_recipe(path.parent.parent, recipe)
    if path is not None:
        if not path.is_dir() or not checkpoint.is_checkpoint(path):
            raise UserError(
                f"--resume {path}: no such checkpoint; allowed: auto, never, or a folder such as "
                f"{out}/checkpoints/step-00001000"
            )
        fault = checkpoint.broken(path)
        if fault:
            raise UserError(f"--resume {path}: {fault}")
        if checkpoint.read_state(path)["data_fingerprint"] != fingerprint:
            raise UserError(f"{path}: the data changed since (shards, their sizes or their images); start a new run")
    return OpenRun(out, path)


def _same_recipe(run: Path, recipe: Job) -> None:
    changed = differences(load_recipe(run / RECIPE, type(recipe)), recipe)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise UserError(f"out: {run} was made by another recipe; give another folder, or set back:\n{lines}")


def create_run(recipe: Job) -> None:
    """Make the run folder and put the resolved recipe into it, as a whole. UserError where it cannot be written."""
    out = Path(recipe.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / f"{RECIPE}.tmp"
        temporary.write_text(dump_recipe(recipe), encoding="utf-8")
        os.replace(temporary, out / RECIPE)
    except OSError as error:
        raise UserError(f"out: {out}: {error.strerror}") from error
