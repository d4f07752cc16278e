"""Keep a step whose loss or gradient is not finite, so that `mpp replay` can run it again.

non-finite/step-00000012/   model.safetensors state.json manifest.json   the weights before the update
                            rank0.safetensors rank0.json …               each process's micro-batches, and what
                                                                         it measured
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpp.data.loader import KeyedDataset
from mpp.errors import MppWarning, UserError, one_line
from mpp.parallel.team import Team
from mpp.recipe.flat import JsonObject
from mpp.runs import checkpoint
from mpp.runs.records import write_json
from mpp.training.batch_norms import batch_norms_of

FOLDER = "non-finite"
KEPT = 3
"""Most steps of a run that are kept. Earlier ones are deleted, because each holds the weights (a guess)."""


@dataclass(frozen=True)
class Share:
    """The part of one process in a kept step."""

    rank: int
    record: JsonObject
    """step, world, seeds and losses of each micro-batch, samples by name, and values that the job adds."""
    micro_batches: list[JsonObject]
    """Tensors of each micro-batch by name, in the original lists and dictionaries."""


class BatchNormStatistics:
    """The statistics of batch norms, which a forward pass changes. They are restored if the step is skipped.

    Args:
        model: Model with the batch norms.
        needed: Whether a step may be skipped. Otherwise nothing is copied.
    """

    def __init__(self, model: nn.Module, *, needed: bool) -> None:
        norms = batch_norms_of(model) if needed else []
        self._values = [value for m in norms for value in m.buffers(recurse=False)]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Copy the statistics."""
        self._before = [value.clone() for value in self._values]

    def restore(self, *, unless: Tensor) -> None:
        """Restore the copies, unless the step was made. This does not wait for the device.

        Args:
            unless: () bool on the device: whether the step was made.
        """
        for value, before in zip(self._values, self._before, strict=True):
            value.copy_(torch.where(unless, value, before))


def keep_step(
    team: Team,
    out: Path,
    step: int,
    model: nn.Module,
    averaged: nn.Module | None,
    dataset: KeyedDataset,
    keys: Sequence[Sequence[tuple[int, int, int]]],
    record: JsonObject,
    *,
    what: str,
    skipped: int,
    allowed: int,
) -> str:
    """Keep a step that was skipped because it is not finite. Every process calls this.

    Args:
        team: The processes of the run.
        out: The run folder.
        step: Number of the step, from 0.
        model: The model with the weights at the start of the step.
        averaged: Moving average of the model, if the loss depends on it.
        dataset: Dataset that creates this process's micro-batches again from `keys`, unchanged.
        keys: (position, shard, row) of the samples of each micro-batch.
        record: Values to record; see `Share.record`.
        what: Loss and norm of the gradient, for the message.
        skipped: Number of steps that were skipped so far, including this one.
        allowed: Number of steps that may be skipped.

    Returns:
        A line for the log.

    Raises:
        UserError: If more than `allowed` steps were skipped.
    """
    fault = None
    try:
        folder = checkpoint.save_together(team, out / FOLDER, step, model, None, {}, keep=KEPT, averaged=averaged)
        stored = {"step": step, "world": team.world, **record}
        _write(folder / f"rank{team.rank}", dataset, keys, stored)
    except (UserError, OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: the device is out of memory
        fault = one_line(error)
    faults = [f for f in team.gather([fault]) if f]
    if faults and team.is_main:
        warnings.warn(f"the step is not kept: {faults[0]}", MppWarning, stacklevel=2)
    advice = "the step could not be kept" if faults else f"`mpp replay {out}` runs the step again"
    advice += "; try a lower optim.base_lr, optim.clip_grad_norm, or precision: fp32"
    if skipped > allowed:
        raise UserError(f"{what}: stopped before the update. {advice}")
    return f"warning: {what}: skipped, {skipped} of at most {allowed}. {advice}"


def losses_as_text(micro_losses: Sequence[Tensor], micro_batches: int) -> list[list[str]]:
    """Return the losses of each micro-batch as text for a record, because JSON has no NaN.

    Args:
        micro_losses: (losses,) losses of each micro-batch, divided by the number of micro-batches.
        micro_batches: Number of micro-batches of a step.
    """
    return [[str(value * micro_batches) for value in losses.tolist()] for losses in micro_losses]


def _write(
    name: Path,
    dataset: KeyedDataset,
    keys: Sequence[Sequence[tuple[int, int, int]]],
    record: JsonObject,
) -> None:
    """Write the share of one process into NAME.safetensors and NAME.json.

    Args:
        name: Path of the files without extension.
        dataset: Dataset that creates the micro-batches again.
        keys: (position, shard, row) of the samples of each micro-batch.
        record: Contents of the JSON file, to which "hidden_units" is added.
    """
    batches = [dataset.__getitems__(list(of_batch)) for of_batch in keys]  # a pure function of the keys
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
    kept = [batch.to_keep() for batch in batches]
    tensors = {at: t for i, (parts, _) in enumerate(kept) for at, t in _flat(parts, str(i)).items()}
    save_file({at: t.contiguous().clone() for at, t in tensors.items()}, name.with_suffix(".safetensors"))
    counts = [count for _, count in kept]
    write_json(name.with_suffix(".json"), {**record, "hidden_units": counts})


def read(folder: Path) -> list[Share]:
    """Read the shares of all processes in a kept step.

    Raises:
        UserError: If a share is missing or cannot be read.
    """
    shares = []
    try:
        for path in sorted(folder.glob("rank*.json"), key=lambda p: int(p.stem.removeprefix("rank"))):
            record = json.loads(path.read_text())
            tensors = load_file(path.with_suffix(".safetensors"))
            batches = [_nested(tensors, str(i)) for i in range(len(record["seeds"]))]
            shares.append(Share(int(path.stem.removeprefix("rank")), record, batches))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: not a kept step: {one_line(error)}") from error
    if not shares or len(shares) != shares[0].record["world"]:
        raise UserError(f"{folder}: not a kept step: {len(shares)} processes' shares are there")
    return shares


def _flat(value: Any, prefix: str) -> dict[str, Tensor]:
    """Return the tensors in nested dictionaries and lists by their dotted paths. Other values are dropped."""
    if isinstance(value, Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: t for k, v in items for name, t in _flat(v, f"{prefix}.{k}").items()}


def _nested(tensors: dict[str, Tensor], prefix: str) -> Any:
    """Return nested dictionaries and lists from tensors by dotted paths, the reverse of `_flat`. Numbers make lists."""
    if prefix in tensors:
        return tensors[prefix]
    keys = sorted({n.removeprefix(f"{prefix}.").split(".")[0] for n in tensors if n.startswith(f"{prefix}.")})
    if keys and all(k.isdecimal() for k in keys):
        return [_nested(tensors, f"{prefix}.{k}") for k in sorted(keys, key=int)]
    return {k: _nested(tensors, f"{prefix}.{k}") for k in keys}
