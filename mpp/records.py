"""The files of a run folder, read, compared and replaced as wholes, without torch: who looks at a run is quick."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECIPE = "recipe.yaml"
_CHECKPOINT = re.compile(r"step-(\d{8})")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole: a reader never sees half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def write_status(out: Path, state: str, **more: Any) -> None:
    """status.json of a run or a cell; while it is running with whose process that is."""
    who = {"host": platform.node(), "pid": os.getpid()} if state == "running" else {}
    write_json(out / "status.json", {"state": state, "time": time.time(), **who, **more})


def read_state(out: Path) -> str:
    """What status.json of a run or a cell says; "" where there is none that can be read."""
    try:
        return str(json.loads((out / "status.json").read_text())["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; [] where there are none. One that was never written to its end is left out."""
    path = out / "metrics.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(record)
    return found


def steps(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first, whether they hold or not."""
    found = [p for p in folder.iterdir() if _CHECKPOINT.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: p.name, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """By its name, whether it holds or not."""
    return _CHECKPOINT.fullmatch(path.name) is not None


def differing(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that are not the same in all of these, sorted."""
    keys = sorted({key for f in flat for key in f})
    return [key for key in keys if any(f.get(key) != flat[0].get(key) for f in flat[1:])]


def flat_keys(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            flat.update(flat_keys(inner, f"{prefix}{key}."))
        else:
            flat[prefix + key] = inner
    return flat
