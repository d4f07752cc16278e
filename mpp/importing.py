"""Weights from elsewhere, as an encoder's folder: opened as tensors alone, compared name by name, verified."""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from mpp import exporting
from mpp.encoders.timm_encoder import create_timm_model, timm_names
from mpp.errors import UserError, one_line

NAMED, LETTERS = 5, 80
"""Weights that a message names, and how much of a name."""
DEEPEST = 8
"""Dictionaries in one another that are looked into."""


@dataclass(frozen=True)
class Imported:
    """What `import_weights` made."""

    verified: exporting.Verified
    prefix: str
    """What stood before the names of the encoder's weights, keys of nested dictionaries among it."""
    left_out: list[str]
    """Names of what is no part of the encoder: heads, decoders, other networks."""
    mean: list[float]
    std: list[float]

    def __str__(self) -> str:
        left_out = f"{len(self.left_out)} tensors left out" + (f" ({_some(self.left_out)})" if self.left_out else "")
        under = f"from {_some([self.prefix])}*; " if self.prefix else ""
        return f"{under}{left_out}; mean {self.mean} and std {self.std} are timm's for this name"


def import_weights(
    file: str | Path,
    out: str | Path,
    *,
    model: str,
    args: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    channels: int = 3,
    prefix: str | None = None,
    trust: bool = False,
) -> Imported:
    """Put the weights in `file`, named as timm names them, into `model` of timm's; export that to `out`, verified.

    They may lie in nested dictionaries and have a prefix. model: with a tag of timm's where mean and std are those of
    the tag. args: of the model. image_size: (H, W) in pixels; None: the model's own. prefix: with the keys of nested
    dictionaries, each with a dot, of the one that is meant where there are several. trust: open a pickle, by torch's
    `weights_only=True`: tensors and plain containers, nothing that runs.
    UserError where the file is not that, and where any of the encoder's weights is missing, of another shape or kind,
    or not finite.
    """
    exporting.check_new(Path(out))
    for key, instead in (("img_size", "--image-size"), ("in_chans", "--channels")):
        if key in (args or {}):
            raise UserError(f"args.{key}: is what {instead} says")
    architecture = model.split(".")[0]
    if ":" in model or architecture not in timm_names(architecture, "model"):
        raise UserError(
            f"model: '{model}': allowed is a name of timm's, such as vit_small_patch16_224, with or without a tag"
        )
    found = dict(_tensors(_opened(Path(file), trust), set()))
    encoder: Any = create_timm_model(
        model,
        image_size=image_size,
        in_chans=channels,
        pretrained=False,
        args=dict(args or {}),
        key="model",
        args_key="args",
    )
    config = encoder.pretrained_cfg
    size = image_size or tuple(config["input_size"][1:])
    exporting.check_size(encoder, size, model, key="image_size")
    wanted: dict[str, Tensor] = encoder.state_dict()
    prefix = _prefix(found, wanted, file) if prefix is None else prefix
    own = {name: found[prefix + name] for name in wanted if prefix + name in found}
    if missing := [name for name in wanted if name not in own]:
        holds = f"it holds {_some(list(found))}" if found else "it holds no weights by name"
        raise UserError(
            f"{file}: {len(missing)} of {len(wanted)} weights of {model}: missing: {_some(missing)}; {holds}"
        )
    if other := [name for name in wanted if own[name].shape != wanted[name].shape]:
        shapes = ", ".join(f"{n} {tuple(own[n].shape)}, wanted {tuple(wanted[n].shape)}" for n in other[:NAMED])
        raise UserError(
            f"{file}: {len(other)} of {len(wanted)} weights of {model} have other shapes: {shapes}; is the model, the "
            "image size or the number of channels another one?"
        )
    if odd := [f"{name} ({own[name].dtype})" for name in wanted if not _fits(own[name], wanted[name])]:
        raise UserError(f"{file}: weights that are no plain numbers of their kind: {_some(odd)}")
    state = {name: own[name].to(wanted[name].dtype) for name in wanted}
    if odd := [name for name, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"{file}: weights that are not finite: {_some(odd)}")
    encoder.load_state_dict(state)
    mean, std = (exporting.for_channels(config[key], channels) for key in ("mean", "std"))
    origin = exporting.Origin(
        mean=mean,
        std=std,
        input_size=(channels, *size),
        made=f"Weights of `{Path(file).name}` in timm's `{model}`.",
        limits="How they were trained is not known here; nor whether mean and std are those of their training.",
    )
    try:
        verified = exporting.export_model(encoder, out, origin)
    except (RuntimeError, AttributeError, NotImplementedError, ValueError, TypeError) as error:  # timm and torch
        raise UserError(f"{model} at {size[0]}×{size[1]} px: {type(error).__name__}: {one_line(error)}") from error
    return Imported(verified, prefix, sorted(found.keys() - {prefix + n for n in own}), mean, std)


def _opened(file: Path, trust: bool) -> Any:
    """What a file holds: by its first bytes, whatever its name."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise UserError(f"{file}: not a file")
        with open(file, "rb") as stream:
            first = stream.read(9)
            if first[8:] == b"{":
                stream.seek(0)
                return load(stream.read())
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error
    except Exception as error:  # safetensors has its own, and some of Python's
        raise UserError(f"{file}: no whole safetensors file: {one_line(error)}") from error
    if not first.startswith((b"PK", b"\x80")):
        raise UserError(f"{file}: neither a safetensors file nor one of torch's")
    if not trust:
        raise UserError(
            f"{file}: a pickle, which may run any code when it is opened. If you trust where it is from, --trust opens "
            "it as tensors and plain containers alone (torch's weights_only)"
        )
    try:
        if first.startswith(b"PK"):
            _compare_checksums(file)
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
            raise UserError(f"{file}: holds more than tensors and plain containers: {_some([refused[1]])}") from error
        raise UserError(f"{file}: damaged, or not of torch.save: {type(error).__name__}") from error


def _compare_checksums(file: Path) -> None:
    """BadZipFile where a part is not what was written: torch does not look."""
    with zipfile.ZipFile(file) as packed:
        for part in packed.infolist():
            if part.CRC:  # torch may have been told to write none
                with packed.open(part) as stream:
                    while stream.read(1 << 20):
                        pass


def _tensors(loaded: Any, seen: set[int], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Weights of nested dictionaries by name, the keys before them. seen: dictionaries that were looked into."""
    if isinstance(loaded, dict) and depth < DEEPEST and id(loaded) not in seen:
        seen.add(id(loaded))  # one that holds itself under many names would take for ever
        for key, value in dict.items(loaded):  # whatever a pickle says that its `items` are
            if isinstance(value, Tensor):
                plain = type(value) is Tensor  # a Parameter may have attributes of a pickle's making
                yield prefix + str(key), value if plain else torch.Tensor.as_subclass(value, Tensor)
            else:
                yield from _tensors(value, seen, f"{prefix}{key}.", depth + 1)


def _prefix(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: str | Path) -> str:
    """What stands before the model's names: `module.`, `teacher.backbone.`, … UserError where that is not one."""
    counts = Counter(name[: -len(own)] for own in wanted for name in found if name.endswith(own))
    whole = sorted(prefix for prefix, count in counts.items() if count == len(wanted))
    if len(whole) > 1:
        raise UserError(f"{file}: holds {len(whole)} whole encoders; say which by --prefix: {_some(whole)}")
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")


def _fits(value: Tensor, wanted: Tensor) -> bool:
    """Whether it is of numbers such as are wanted: no complex ones, no integers that weights were cut to."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and not value.is_complex() and value.is_floating_point() == wanted.is_floating_point()


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    shown = (json.dumps(n)[1:-1] for n in names[:NAMED])
    cut = [n if len(n) <= LETTERS else n[:LETTERS] + "…" for n in shown]
    return ", ".join(cut) + (f" and {more} more" if more > 0 else "")
