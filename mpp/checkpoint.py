"""Checkpoints that are whole or not there: written aside, checksummed, renamed. safetensors and JSON, no pickle.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  state.json  manifest.json
                                averaged.safetensors, where a moving average of the weights is kept

A folder that was not renamed (`.tmp`) does not count; one whose manifest does not hold is passed over, with a
warning that names the file, and the one before is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpp import faults
from mpp.errors import MppWarning, UserError

FORMAT = 2
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    *,
    keep: int | None,
    averaged: nn.Module | None = None,
) -> Path:
    """Write the checkpoint of `step`; keep it and the newest `keep` - 1 before it, or all. Call it on one process.

    UserError, with path and free space, where it cannot be written; earlier checkpoints are not touched then.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f"{final.name}.tmp"
    try:
        faults.point("save.begins")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        faults.point("save.folder_made")
        save_file(_on_cpu(model.state_dict()), aside / "model.safetensors")
        faults.point("save.model_written", aside / "model.safetensors")
        if averaged is not None:
            save_file(_on_cpu(averaged.state_dict()), aside / "averaged.safetensors")
            faults.point("save.averaged_written", aside / "averaged.safetensors")
        if optimizer is not None:
            save_file(_on_cpu(optimizer_tensors(model, optimizer)), aside / "optimizer.safetensors")
            faults.point("save.optimizer_written", aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, **state}, indent=1))
        faults.point("save.state_written", aside / "state.json")
        files = sorted(p for p in aside.iterdir())
        for path in files:  # safetensors writes for the owner alone
            shutil.copymode(aside / "state.json", path)
        for path in files:
            _sync(path)
        faults.point("save.files_synced")
        manifest = {p.name: _sha256(p) for p in files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        faults.point("save.manifest_written", aside / MANIFEST)
        _sync(aside / MANIFEST)
        _sync(aside)
        if final.exists():  # saved before an interruption that came after; the same step, the same content
            shutil.rmtree(final)
        faults.point("save.before_rename")
        os.replace(aside, final)
        faults.point("save.renamed")
        _sync(folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"{final}: cannot be saved: {getattr(error, 'strerror', None) or error} ({_free(folder)})"
        ) from error
    # Later steps belong to a run that was left: broken, or newer than the checkpoint this one went on from.
    earlier = [p for p in steps(folder) if p.name <= final.name]
    for old in (*(earlier[keep:] if keep else ()), *(p for p in steps(folder) if p.name > final.name)):
        _remove(old)
    faults.point("save.ends")
    return final


def keep_only(folder: Path, step: int) -> None:
    """Delete every checkpoint of a folder but that of `step`. Call it on one process."""
    for path in steps(folder):
        if path.name != f"step-{step:08d}":
            _remove(path)


def _remove(path: Path) -> None:
    """Its manifest first, so that what was removed by half does not hold."""
    faults.point("prune.before")
    (path / MANIFEST).unlink(missing_ok=True)
    faults.point("prune.inside")
    shutil.rmtree(path, ignore_errors=True)
    faults.point("prune.after")


def steps(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first, whether they hold or not."""
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: p.name, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """By its name, whether it holds or not."""
    return _NAME.fullmatch(path.name) is not None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose manifest holds; a warning for each newer one that does not. None: there is none.

    UserError where there are some and none of them holds: to begin again is for the user to say.
    """
    faults: list[str] = []
    for path in steps(folder):
        fault = broken(path)
        if fault is None:
            for line in faults:
                warnings.warn(f"{line}; the checkpoint before it is used", MppWarning, stacklevel=2)
            return path
        faults.append(f"{path}: {fault}")
    if faults:
        raise UserError("\n".join([*faults, f"{folder}: no checkpoint holds; remove them to begin again from step 0"]))
    return None


def broken(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest: Any = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    if not isinstance(manifest, dict) or not manifest.keys() >= {"model.safetensors", "state.json"}:
        return f"{MANIFEST} is not one"
    for name, digest in manifest.items():
        file = path / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if _sha256(file) != digest:
            return f"{name} does not match its checksum"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The counters of a checkpoint. UserError for a folder that holds none, or of another format."""
    try:
        state: Any = json.loads((path / "state.json").read_text())
        if not isinstance(state, dict):
            raise ValueError("state.json holds no counters")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint: {error}") from error
    if state.get("format") != FORMAT:
        raise UserError(f"{path}: checkpoint format {state.get('format')}; this version reads {FORMAT}")
    found: dict[str, Any] = state
    return found


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    averaged: nn.Module | None = None,
    *,
    checked: bool = False,
) -> None:
    """Put a checkpoint's tensors into model and optimizer, strictly. UserError where they do not fit.

    checked: compare its files with the manifest first, as `newest` does. UserError where they differ.
    """
    if checked and (fault := broken(path)):
        raise UserError(f"{path}: {fault}")
    faults.point("load.begins")
    try:
        model.load_state_dict(load_file(path / "model.safetensors"))
        faults.point("load.model_read")
        if averaged is not None:
            averaged.load_state_dict(load_file(path / "averaged.safetensors"))
        if optimizer is not None:
            _load_optimizer(load_file(path / "optimizer.safetensors"), model, optimizer)
        faults.point("load.ends")
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise UserError(f"{path}: does not fit this recipe: {str(error).splitlines()[0]}") from error


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by parameter name, so that no order of groups is needed to read it back."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        f"{names[id(p)]}|{key}": value
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state.get(p, {}).items()
    }


def _load_optimizer(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    state: dict[Tensor, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("|")
        p = parameters[parameter]
        state.setdefault(p, {})[key] = value.to(p.device)
    optimizer.state.update(state)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().cpu().contiguous() for n, t in tensors.items()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.3f} GB free there"
    except OSError:
        return "free space unknown"
