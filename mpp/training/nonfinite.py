"""A step whose loss or gradient is not finite, kept so that `mpp replay` can run it again.

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
"""Steps of a run that are kept: those before are deleted, since each holds the weights (a guess)."""


@dataclass(frozen=True)
class Share:
    """What one process did in the step."""

    rank: int
    record: JsonObject
    """step, world, seeds and losses of each micro-batch, samples by name, and what the job adds."""
    micro_batches: list[JsonObject]
    """Tensors by name; what came in lists and dictionaries is in them again."""


class BatchNormStatistics:
    """The statistics of batch norms, which a forward pass changes: restored if the step is left out.

    Args:
        model: Whose they are.
        needed: Whether a step may be left out; nothing is copied otherwise.
    """

    def __init__(self, model: nn.Module, *, needed: bool) -> None:
        norms = batch_norms_of(model) if needed else []
        self._values = [value for m in norms for value in m.buffers(recurse=False)]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Copy them."""
        self._before = [value.clone() for value in self._values]

    def restore(self, *, unless: Tensor) -> None:
        """Put the copies back. unless: () bool on the device, whether the step was made; the device is not asked."""
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
    """Keep a step that was left out because it is not finite. Every process calls this.

    Args:
        team: The processes of the run.
        out: The run folder.
        step: Counts from 0.
        model: With the weights that the step began with.
        averaged: A moving average of them, if the loss depends on it.
        dataset: What makes this process's micro-batches again, as they were, from `keys`.
        keys: (position, shard, row) of the samples of each micro-batch.
        record: See `Share.record`.
        what: The loss and the gradient's norm, for the message.
        skipped: Steps that were left out so far, with this one.
        allowed: How many may be.

    Returns:
        A line for the log.

    Raises:
        UserError: More steps were left out than `allowed`.
    """
    fault = None
    try:
        folder = checkpoint.save_together(team, out / FOLDER, step, model, None, {}, keep=KEPT, averaged=averaged)
        stored = {"step": step, "world": team.world, **record}
        _write(folder / f"rank{team.rank}", dataset, keys, stored)
    except (UserError, OSError, SafetensorError, RuntimeError) as error:  # memory of the device, too
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
    """Return the losses of each micro-batch as a record holds them, (objectives,) each; JSON has no NaN."""
    return [[str(value * micro_batches) for value in losses.tolist()] for losses in micro_losses]


def _write(
    name: Path,
    dataset: KeyedDataset,
    keys: Sequence[Sequence[tuple[int, int, int]]],
    record: JsonObject,
) -> None:
    """One process's share: NAME.safetensors and NAME.json. name: without an ending."""
    batches = [dataset.__getitems__(list(of_batch)) for of_batch in keys]  # pure: as they were
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
    kept = [batch.to_keep() for batch in batches]
    tensors = {at: t for i, (parts, _) in enumerate(kept) for at, t in _flat(parts, str(i)).items()}
    save_file({at: t.contiguous().clone() for at, t in tensors.items()}, name.with_suffix(".safetensors"))
    counts = [count for _, count in kept]
    write_json(name.with_suffix(".json"), {**record, "hidden_units": counts})


def read(folder: Path) -> list[Share]:
    """Read what each process did in a kept step.

    Raises:
        UserError: It is not all there.
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
    """Tensors in dictionaries and lists -> by their paths; other values are not kept."""
    if isinstance(value, Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: t for k, v in items for name, t in _flat(v, f"{prefix}.{k}").items()}


def _nested(tensors: dict[str, Tensor], prefix: str) -> Any:
    """The reverse; lists are those whose keys are numbers."""
    if prefix in tensors:
        return tensors[prefix]
    keys = sorted({n.removeprefix(f"{prefix}.").split(".")[0] for n in tensors if n.startswith(f"{prefix}.")})
    if keys and all(k.isdecimal() for k in keys):
        return [_nested(tensors, f"{prefix}.{k}") for k in sorted(keys, key=int)]
    return {k: _nested(tensors, f"{prefix}.{k}") for k in keys}
