"""Read and replace the files of runs and exports. torch is not imported, so that looking at a run is quick."""

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
    """Replace a JSON file atomically, so that a reader never sees an incomplete file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def _finite(value: object) -> object:
    """Replace NaN and infinity by None. JSON has no notation for them, and many readers refuse Python's."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def nan_if_null(value: float | None) -> float:
    """Return a number from a file of `write_json`; null becomes nan."""
    return math.nan if value is None else float(value)


def write_status(out: Path, state: str, **more: object) -> None:
    """Write status.json of a run or a trial. While it is running, the file names its host and process.

    Args:
        out: Folder of the run or trial.
        state: running, finished, stopped or failed.
        **more: Other values of the file, such as the step.
    """
    who = {"host": platform.node(), "pid": os.getpid()} if state == "running" else {}
    write_json(out / "status.json", {"state": state, "time": time.time(), **who, **more})


def read_status(out: Path) -> str:
    """Return the state in status.json of a run or a trial; "" if there is none that can be read."""
    try:
        return str(json.loads((out / "status.json").read_text())["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def read_metrics(out: Path) -> list[JsonObject]:
    """Return the lines of metrics.jsonl; [] if there are none. An incomplete line is left out."""
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


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the finished checkpoints of a folder, newest first. Broken ones are included."""
    checkpoints = [p for p in folder.iterdir() if _CHECKPOINT.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(checkpoints, key=lambda p: p.name, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is named like a checkpoint. The checkpoint may be broken."""
    return _CHECKPOINT.fullmatch(path.name) is not None


def timm_folder(source: str | Path) -> Path | None:
    """Return the timm folder of a run or an export, or None if there is none."""
    for folder in (Path(source) / "encoder", Path(source)):
        if (folder / "config.json").exists() and (folder / "model.safetensors").exists():
            return folder
    return None


def encoder_folder(source: str | Path) -> Path:
    """Return the timm folder of a run or an export.

    Raises:
        UserError: If there is none.
    """
    if folder := timm_folder(source):
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError):
            return folder  # opening the encoder reports what is wrong with it
        if isinstance(config, dict) and "model_type" in config and "architecture" not in config:
            raise UserError(f"{folder}: a transformers folder; `mpp import {folder} OUT` converts it")
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
        raise UserError(f"{source}: is an export as {as_what}; give the run or the timm folder it was made from")
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if (Path(source) / "recipe.yaml").exists():
        if read_status(Path(source)) == "running":
            raise UserError(
                f"{source}: this run is still in progress, or was killed, and has not written its encoder yet; "
                "`mpp watch` shows which"
            )
        raise UserError(f"{source}: this run has not written its encoder yet; finish it with --resume auto")
    raise UserError(f"{source}: neither a run nor an exported encoder (no config.json with model.safetensors)")


def check_new(folder: Path) -> None:
    """Check that a folder does not exist yet, or is empty.

    Raises:
        UserError: If the folder is not empty, or cannot be read.
    """
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: not empty; give a new folder")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {reason(error)}") from error


def check_beside(out: Path, source: Path) -> None:
    """Check that an output folder is not inside the folder that it is made from.

    Raises:
        UserError: If it is.
    """
    if out.absolute().is_relative_to(source.absolute()):
        raise UserError(f"{out}: is inside {source}; choose another folder")
