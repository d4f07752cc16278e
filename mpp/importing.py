"""Weights from elsewhere, as an encoder's folder: opened as tensors alone, compared name by name, verified."""

from __future__ import annotations

import argparse
import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mpp import exporting
from mpp.encoders.timm_encoder import create_timm_model
from mpp.errors import UserError, one_line

NESTED = ("model", "state_dict", "model_state_dict", "teacher", "student", "module", "net", "encoder", "backbone")
"""Keys under which training programs keep the weights, the first that is there; they may stand in one another."""
NAMED = 5
"""Weights that a message names."""


@dataclass(frozen=True)
class Imported:
    """What `import_weights` made."""

    verified: exporting.Verified
    prefix: str
    """What stood before the names of the encoder's weights."""
    left_out: list[str]
    """Names of what is no part of the encoder: heads, decoders, other networks."""


def import_weights(
    file: str | Path,
    out: str | Path,
    *,
    model: str,
    args: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    channels: int = 3,
    trust: bool = False,
) -> Imported:
    """Put the weights in `file`, named as timm names them, into `model` of timm's; export that to `out`, verified.

    They may be nested and have a prefix. args: of the model. image_size: (H, W) in pixels; None: the model's own.
    trust: open a pickle, by torch's `weights_only=True`: tensors and plain containers, nothing that runs.
    UserError where the file is not that, and where any of the encoder's weights is missing, of another shape or not
    finite.
    """
    found = _tensors(_opened(Path(file), trust), file)
    encoder: Any = create_timm_model(
        model,
        image_size=image_size,
        in_chans=channels,
        pretrained=False,
        args=dict(args or {}),
        key="model",
        args_key="args",
    )
    wanted: dict[str, Tensor] = encoder.state_dict()
    prefix = _prefix(found, wanted)
    own = {name: found[prefix + name] for name in wanted if prefix + name in found}
    if missing := [name for name in wanted if name not in own]:
        holds = f"it holds {_some(list(found))}"
        raise UserError(
            f"{file}: {len(missing)} of {len(wanted)} weights of {model}: missing: {_some(missing)}; {holds}"
        )
    if other := [name for name in wanted if own[name].shape != wanted[name].shape]:
        shapes = ", ".join(f"{n} {tuple(own[n].shape)}, wanted {tuple(wanted[n].shape)}" for n in other[:NAMED])
        raise UserError(
            f"{file}: {len(other)} of {len(wanted)} weights of {model} have other shapes: {shapes}; is the model, the "
            "image size or the number of channels another one?"
        )
    if odd := [name for name, value in own.items() if not value.isfinite().all()]:
        raise UserError(f"{file}: weights that are not finite: {_some(odd)}")
    encoder.load_state_dict(own)
    mean, std = exporting.own_normalisation(model, channels) or ([0.5] * channels, [0.5] * channels)
    origin = exporting.Origin(
        mean=mean,
        std=std,
        input_size=(channels, *(image_size or encoder.pretrained_cfg["input_size"][1:])),
        made=f"Weights of `{Path(file).name}` in timm's `{model}`.",
        limits="How they were trained is not known here; nor whether mean and std are those of their training.",
    )
    return Imported(
        exporting.export_model(encoder, out, origin), prefix, sorted(found.keys() - {prefix + n for n in own})
    )


def _opened(file: Path, trust: bool) -> Any:
    """What a file holds: by its first bytes, whatever its name."""
    try:
        with open(file, "rb") as stream:
            first = stream.read(9)
        if first[8:] == b"{" and int.from_bytes(first[:8], "little") <= file.stat().st_size:
            return load_file(file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{file}: no whole safetensors file: {one_line(error)}") from error
    if not zipfile.is_zipfile(file) and first[:1] != b"\x80":
        raise UserError(f"{file}: neither a safetensors file nor one of torch's")
    if not trust:
        raise UserError(
            f"{file}: a pickle, which may run any code when it is opened. If you trust where it is from, --trust opens "
            "it as tensors and plain containers alone (torch's weights_only)"
        )
    try:
        # training programs keep their arguments beside the weights; a Namespace holds attributes, and does nothing
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(action="ignore"),
            open(file, "rb") as stream,
        ):
            return torch.load(stream, map_location="cpu", weights_only=True)  # of a path it would believe the ending
    except Exception as error:  # torch, zipfile and pickle each have their own
        refused = re.search(r"(?i)unsupported (?:global: )?(?:GLOBAL|class) (\S+)", str(error))
        if refused:
            raise UserError(f"{file}: holds more than tensors and plain containers: {refused[1]}") from error
        raise UserError(f"{file}: damaged, or not of torch: {type(error).__name__}") from error


def _tensors(loaded: Any, file: str | Path) -> dict[str, Tensor]:
    """Weights by name, from wherever in nested dictionaries they are. UserError where there are none."""
    if isinstance(loaded, Mapping):
        if found := {str(k): v for k, v in loaded.items() if isinstance(v, Tensor) and v.layout == torch.strided}:
            return found
        for key in NESTED:
            if isinstance(loaded.get(key), Mapping):
                return _tensors(loaded[key], file)
        raise UserError(
            f"{file}: no weights: it holds {_some([str(key) for key in loaded])}; known are {', '.join(NESTED)}"
        )
    raise UserError(f"{file}: no weights by name: a {type(loaded).__name__}")


def _prefix(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What stands before most of the model's names: `module.`, `backbone.`, …"""
    counts = Counter(name[: -len(own)] for own in wanted for name in found if name.endswith(own))
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(json.dumps(n)[1:-1] for n in names[:NAMED]) + (f" and {more} more" if more > 0 else "")
