"""Write and read checkpoints. A checkpoint is either complete or absent. It holds safetensors and JSON, no pickle.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  state.json  manifest.json
                                averaged.safetensors, if a moving average of the weights is kept
                                model-rank0-of-2.safetensors …, if the model is sharded (fsdp): the rows of one
                                process; the file's metadata has the first row and the number of rows of the tensor

A checkpoint is written to a temporary folder (`.tmp`), checksummed and then renamed. Folders that were never renamed
do not count. If a manifest does not match the files, the checkpoint is skipped and the one before it is used. A warning
names the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpp.errors import MppWarning, ToldElsewhere, UserError
from mpp.parallel import faults
from mpp.parallel.sharding import like, own_part, own_rows
from mpp.parallel.team import Team
from mpp.recipe.flat import JsonObject
from mpp.runs.records import checkpoints_in

FORMAT = 2
MANIFEST = "manifest.json"

T = TypeVar("T")


class Writers(NamedTuple):
    """The processes that write one checkpoint, each its own part."""

    rank: int = 0
    world: int = 1
    gathered: Callable[[list[Any]], list[Any]] = list
    """Gathers a list from every process, in the order of ranks, and returns the joined list on every process."""

    def name(self, stem: str) -> str:
        return f"{stem}.safetensors" if self.world == 1 else f"{stem}-rank{self.rank}-of-{self.world}.safetensors"


ALONE = Writers()


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: JsonObject,
    *,
    keep: int | None,
    keep_step: int | None = None,
    averaged: nn.Module | None = None,
    writers: Writers = ALONE,
) -> Path:
    """Write the checkpoint of a step, and delete those that are no longer needed.

    If the model is sharded, every process calls this with its own part. Else only one process calls it.

    Args:
        folder: Folder of the run's checkpoints.
        step: Number of optimizer steps done.
        model: Model whose weights are saved.
        optimizer: Optimizer whose state is saved. None means no optimizer.
        state: Content of state.json in addition to the step.
        keep: Number of newest checkpoints that are kept. None means all.
        keep_step: Step whose checkpoint is kept in addition.
        averaged: Moving average of the model's weights, if there is one.
        writers: Processes that write the checkpoint.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: If the checkpoint cannot be written. It is raised on every process and names the path and the free
            space. Earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f"{final.name}.tmp"
    tensors = {"model": lambda: model.state_dict()}
    if averaged is not None:
        tensors["averaged"] = lambda: averaged.state_dict()
    if optimizer is not None:
        tensors["optimizer"] = lambda: optimizer_tensors(model, optimizer)

    # All writers finish each step, or all give it up: none waits for a process that has failed. The folder gets its
    # final name only when everything in it is on the disk.
    together = partial(_together, writers, final, aside)
    together(partial(_begin, aside), on=0)
    written = together(partial(_write, aside, {"format": FORMAT, "step": step, **state}, tensors, writers))
    digests = {name: digest for of_one in written for name, digest in (of_one or {}).items()}
    together(partial(_finish, aside, final, digests), on=0)
    if writers.rank == 0:
        # Later steps are left from an earlier attempt: they are broken, or newer than the checkpoint it resumed from.
        spared = None if keep_step is None else f"step-{keep_step:08d}"
        earlier = [p for p in checkpoints_in(folder) if p.name <= final.name and p.name != spared]
        for old in (*(earlier[keep:] if keep else ()), *(p for p in checkpoints_in(folder) if p.name > final.name)):
            remove(old)
    faults.point("save.ends")
    return final


def _begin(aside: Path) -> None:
    """Make the temporary folder, next to the final one."""
    faults.point("save.begins")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    faults.point("save.folder_made")


def _write(
    aside: Path, state: JsonObject, tensors: dict[str, Callable[[], dict[str, Tensor]]], writers: Writers
) -> dict[str, str]:
    """Write and sync the files of this process, and return file name -> checksum."""
    for stem, make in tensors.items():
        path = aside / writers.name(stem)
        _save_part(make(), path, writers)
        faults.point(f"save.{stem}_written", path)
    files = [aside / writers.name(stem) for stem in tensors]
    if writers.rank == 0:
        files.append(aside / "state.json")
        files[-1].write_text(json.dumps(state, indent=1))
        faults.point("save.state_written", files[-1])
    for path in files:
        _sync(path)
    faults.point("save.files_synced")
    return {path.name: _sha256(path) for path in files}


def _finish(aside: Path, final: Path, digests: dict[str, str]) -> None:
    """Write the manifest, sync the folder, and give it its final name."""
    (aside / MANIFEST).write_text(json.dumps(digests, indent=1, sort_keys=True))
    faults.point("save.manifest_written", aside / MANIFEST)
    for name in digests:  # safetensors makes files that only the owner can read
        shutil.copymode(aside / MANIFEST, aside / name)
    _sync(aside / MANIFEST)
    _sync(aside)
    if final.exists():  # saved before the run was interrupted; the same step has the same content
        shutil.rmtree(final)
    faults.point("save.before_rename")
    os.replace(aside, final)
    faults.point("save.renamed")
    _sync(final.parent)


def _together(
    writers: Writers, final: Path, aside: Path, act: Callable[[], T], *, on: int | None = None
) -> list[T | None]:
    """Call `act` on each process, or only on rank `on`, and return the results by rank (None if not called).

    Raises:
        UserError: If `act` failed on any process; raised on all of them.
    """
    fault, result = None, None
    try:
        if on is None or writers.rank == on:
            result = act()
    except (OSError, SafetensorError) as error:  # safetensors raises its own error if the disk is full
        fault = error
    line = fault and f"{final}: cannot be saved: {getattr(fault, 'strerror', None) or fault} ({_free(final.parent)})"
    reports = writers.gathered([(line, result)])
    first = next((line for line, _ in reports if line), None)
    if first:
        if writers.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(first) from fault
        raise ToldElsewhere(first) from fault
    return [value for _, value in reports]


def save_together(
    team: Team,
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: JsonObject,
    **how: Any,
) -> Path:
    """Save a checkpoint from the main process, or from all processes if the model is sharded. Every process calls this.

    Args:
        team: The processes.
        folder: Folder of the run's checkpoints.
        step: Number of optimizer steps done.
        model: Model whose weights are saved.
        optimizer: Optimizer whose state is saved. None means no optimizer.
        state: Other values that resuming needs.
        **how: Other arguments of `save`.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: If the checkpoint cannot be written.
    """
    act = partial(save, folder, step, model, optimizer, state, **how)
    if all(own_rows(p) is None for p in model.parameters()):
        return team.on_main(act)
    return act(writers=Writers(team.rank, team.world, team.gather))


def keep_only(folder: Path, step: int) -> None:
    """Delete every checkpoint of a folder except that of `step`. Call this on one process only."""
    for path in checkpoints_in(folder):
        if path.name != f"step-{step:08d}":
            remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint, its manifest first, so that a half-deleted checkpoint does not count as intact."""
    faults.point("prune.before")
    (path / MANIFEST).unlink(missing_ok=True)
    faults.point("prune.inside")
    shutil.rmtree(path, ignore_errors=True)
    faults.point("prune.after")


def newest(folder: Path, *, length: list[float | None] | None = None) -> Path | None:
    """Return the newest intact checkpoint, or None if there are no checkpoints. Warn about each newer broken one.

    Args:
        folder: Folder of the run's checkpoints.
        length: Length of the run as the recipe states it, if it may have been changed. See `fits_length`.

    Raises:
        UserError: If there are checkpoints but all are broken, or none fits the length. The user must decide whether to
            start again.
    """
    faults: list[str] = []
    of_another_length: Path | None = None
    for path in checkpoints_in(folder):
        fault = broken(path)
        if fault is None:
            if length is not None and not fits_length(read_state(path), length):
                of_another_length = path
                continue
            for line in faults:
                warnings.warn(f"{line}; the checkpoint before it is used", MppWarning, stacklevel=2)
            return path
        faults.append(f"{path}: {fault}")
    if of_another_length is not None:
        raise UserError(
            f"{of_another_length}: the learning rate of the shorter run had fallen by then, and there is no intact "
            "checkpoint of before; continue with the former length, or choose another folder"
        )
    if faults:
        raise UserError("\n".join([*faults, f"{folder}: no checkpoint holds; remove them to begin again from step 0"]))
    return None


def fits_length(state: JsonObject, length: list[float | None]) -> bool:
    """Return whether a run of this length would have reached the same weights.

    It would if the checkpoint was written by a run of this length, or before the learning rate fell.
    """
    planned = state.get("length", length)
    return planned == length or state["step"] <= state["steps_before_decay"]


def broken(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is intact."""
    try:
        manifest: Any = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    if not isinstance(manifest, dict) or "state.json" not in manifest or not _files_of("model", manifest):
        return f"{MANIFEST} is not one"
    for name, digest in manifest.items():
        file = path / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if _sha256(file) != digest:
            return f"{name} does not match its checksum"
    return None


def read_state(path: Path) -> JsonObject:
    """Return the content of a checkpoint's state.json.

    Raises:
        UserError: If the folder is not a checkpoint, or the checkpoint has another format.
    """
    try:
        state: Any = json.loads((path / "state.json").read_text())
        if not isinstance(state, dict):
            raise ValueError("state.json holds no counters")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint: {error}") from error
    if state.get("format") != FORMAT:
        raise UserError(f"{path}: checkpoint format {state.get('format')}; this version reads {FORMAT}")
    checked: JsonObject = state
    return checked


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    averaged: nn.Module | None = None,
    *,
    checked: bool = False,
) -> None:
    """Load a checkpoint into model and optimizer, strictly.

    Args:
        path: Folder of the checkpoint.
        model: Model that gets the weights.
        optimizer: Optimizer that gets the saved state. None means that the state is not loaded.
        averaged: Model that gets the averaged weights. None means that they are not loaded.
        checked: Whether the files are compared with the manifest first, as `newest` does.

    Raises:
        UserError: If the tensors do not fit, or the files do not match the manifest.
    """
    if checked and (fault := broken(path)):
        raise UserError(f"{path}: {fault}")
    faults.point("load.begins")
    try:
        model.load_state_dict(_read(path, "model", model.state_dict()))
        faults.point("load.model_read")
        if averaged is not None:
            averaged.load_state_dict(_read(path, "averaged", averaged.state_dict()))
        if optimizer is not None:
            _load_optimizer(path, model, optimizer)
        faults.point("load.ends")
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise UserError(f"{path}: does not fit this recipe: {str(error).splitlines()[0]}") from error


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by parameter name, so that loading does not depend on the order of groups."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        f"{names[id(p)]}|{key}": value
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state.get(p, {}).items()
    }


def _load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    state: dict[Tensor, dict[str, Tensor]] = {}
    for name, value in _read(path, "optimizer", parameters, of=lambda name: name.rpartition("|")[0]).items():
        parameter, _, key = name.rpartition("|")
        p = parameters[parameter]
        value = value.to(p.device)
        if value.shape == p.shape and not p.is_contiguous():  # give it the memory layout of its parameter
            value = torch.empty_like(p, dtype=value.dtype).copy_(value)
        state.setdefault(p, {})[key] = value
    optimizer.state.update(state)


def _files_of(stem: str, names: Iterable[str]) -> list[str]:
    """Return the files that hold the tensors of `stem`, named as by `Writers.name`."""
    return sorted(name for name in names if re.fullmatch(rf"{stem}(-rank\d+-of-\d+)?\.safetensors", name))


def _save_part(tensors: dict[str, Tensor], path: Path, writers: Writers) -> None:
    """Write this process's rows of sharded tensors. Only rank 0 also writes the tensors that are not sharded."""
    mine: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for name, value in tensors.items():
        rows = own_rows(value)
        if rows is not None:
            places[name] = f"{rows.start} of {value.shape[0]}"
        if rows is not None or writers.rank == 0:
            mine[name] = own_part(value).detach().cpu().contiguous()
    save_file(mine, path, places or None)


def _read(path: Path, stem: str, wanted: Mapping[str, Tensor], of: Callable[[str], str] = str) -> dict[str, Tensor]:
    """Return the saved tensors by name, read from one file or from the parts of all processes.

    A tensor is returned as a shard if its counterpart in `wanted` is sharded.

    Args:
        path: Folder of the checkpoint.
        stem: What to read: "model", "averaged" or "optimizer".
        wanted: Tensors of this process by name, as the saved ones are to be sharded.
        of: Maps the name of a saved tensor to the name of its counterpart in `wanted`.
    """
    names, whole = _files_of(stem, os.listdir(path)), ALONE.name(stem)
    if not names:
        raise FileNotFoundError(f"{whole} is missing")
    if names == [whole] and all(own_rows(value) is None for value in wanted.values()):
        return load_file(path / whole)
    with ExitStack() as opened:
        parts: dict[str, list[_Part]] = {}
        for file in names:
            reading = opened.enter_context(safe_open(path / file, "pt"))
            places = reading.metadata() or {}
            for name in reading.keys():  # noqa: SIM118  it is no dictionary
                first, _, rows = places.get(name, "").partition(" of ")
                shape = reading.get_slice(name).get_shape()
                parts.setdefault(name, []).append(
                    _Part(reading, int(first or 0), [int(rows), *shape[1:]] if rows else shape)
                )
        return {name: _joined(name, parts_of_tensor, wanted.get(of(name))) for name, parts_of_tensor in parts.items()}


class _Part(NamedTuple):
    """The part of a tensor that one file holds."""

    reading: Any
    first_row: int
    shape: list[int]
    """Shape of the whole tensor."""


def _joined(name: str, parts: list[_Part], wanted: Tensor | None) -> Tensor:
    """Return the whole tensor, or only this process's rows if `wanted` is sharded and has the same shape."""
    rows = own_rows(wanted) if wanted is not None and list(wanted.shape) == parts[0].shape else None
    parts = sorted(parts, key=lambda part: part.first_row)
    if rows is None:
        rows_read = [part.reading.get_tensor(name) for part in parts]
        return rows_read[0] if len(rows_read) == 1 else torch.cat(rows_read)
    assert wanted is not None
    rows_read = []
    for part in parts:
        stored = part.reading.get_slice(name)
        here = range(part.first_row, part.first_row + stored.get_shape()[0])
        first, last = max(rows.start, here.start), min(rows.stop, here.stop)
        if first < last:
            rows_read.append(stored[first - here.start : last - here.start])
    return like(torch.cat(rows_read) if rows_read else torch.empty(0, *wanted.shape[1:], dtype=wanted.dtype), wanted)


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
