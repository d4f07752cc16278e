"""The files of runs and exports, read, compared and replaced as wholes, without torch: who looks at a run is quick."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from pathlib import Path

from mpp.errors import UserError, reason
from mpp.recipe.flat import JsonObject

RECIPE = "recipe.yaml"
_CHECKPOINT = re.compile(r"step-(\d{8})")


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file as a whole: a reader never sees half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def _finite(value: object) -> object:
    """A number that is none becomes null: JSON has no other word for it, and many readers refuse Python's NaN."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def nan_if_null(value: float | None) -> float:
    """Return a number as `write_json` was given it."""
    return math.nan if value is None else float(value)


def write_status(out: Path, state: str, **more: object) -> None:
    """status.json of a run or a trial; while it is running with whose process that is."""
    who = {"host": platform.node(), "pid": os.getpid()} if state == "running" else {}
    write_json(out / "status.json", {"state": state, "time": time.time(), **who, **more})


def read_state(out: Path) -> str:
    """What status.json of a run or a trial says; "" where there is none that can be read."""
    try:
        return str(json.loads((out / "status.json").read_text())["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def read_metrics(out: Path) -> list[JsonObject]:
    """The lines of metrics.jsonl; [] where there are none. One that was never written to its end is left out."""
    path = out / "metrics.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def steps(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first, whether they hold or not."""
    checkpoints = [p for p in folder.iterdir() if _CHECKPOINT.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(checkpoints, key=lambda p: p.name, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """By its name, whether it holds or not."""
    return _CHECKPOINT.fullmatch(path.name) is not None


def timm_folder(source: str | Path) -> Path | None:
    """The timm folder of a run or an export, or None."""
    for folder in (Path(source) / "encoder", Path(source)):
        if (folder / "config.json").exists() and (folder / "model.safetensors").exists():
            return folder
    return None


def encoder_folder(source: str | Path) -> Path:
    """Return the timm folder of a run or an export.

    Raises:
        UserError: There is none.
    """
    if folder := timm_folder(source):
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError):
            return folder  # what is wrong with it is found where it is opened
        if isinstance(config, dict) and "model_type" in config and "architecture" not in config:
            raise UserError(f"{folder}: a folder of transformers'; `mpp import {folder} OUT` makes an encoder of it")
        return folder
    if trials := sorted(Path(source).glob("*-seed*/encoder")):
        raise UserError(f"{source}: a fine-tuning run of several models; name one, such as {trials[0].parent}")
    if Path(source).is_file() or any((Path(source) / n).exists() for n in ("pytorch_model.bin", "model.bin")):
        raise UserError(
            f"{source}: not a folder with config.json and model.safetensors; pickled weights are never opened "
            "here, since a pickle may run any code; see `mpp import`"
        )
    try:
        as_what = json.loads((Path(source) / "export.json").read_text())["format"]
        raise UserError(f"{source}: an export as {as_what}; give the run or the timm folder that it was made of")
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if (Path(source) / "recipe.yaml").exists():
        if read_state(Path(source)) == "running":
            raise UserError(
                f"{source}: this run is still in progress, or was killed, and has not written its encoder yet; "
                "`mpp watch` shows which"
            )
        raise UserError(f"{source}: this run has not written its encoder yet; finish it with --resume auto")
    raise UserError(f"{source}: neither a run nor an exported encoder (no config.json with model.safetensors)")


def check_new(folder: Path) -> None:
    """Check that a folder is not there yet, or empty.

    Raises:
        UserError: Something is in it.
    """
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: not empty; give a new folder")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {reason(error)}") from error


def check_beside(out: Path, source: Path) -> None:
    """Check that a folder would not be written into the one that it is made of.

    Raises:
        UserError: It would.
    """
    if out.absolute().is_relative_to(source.absolute()):
        raise UserError(f"{out}: is inside {source}; choose another folder")
