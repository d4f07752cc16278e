"""Weights from elsewhere, as an encoder's folder: opened as tensors alone, renamed, compared name by name, verified."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from mpp.encoders.creation import create_timm_model, timm_names
from mpp.encoders.folder import Origin, pool_patches, save_encoder
from mpp.encoders.resolve import for_channels
from mpp.encoders.sources import check_size
from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError, one_line
from mpp.exchange import naming_rules as keymap
from mpp.exchange.naming_rules import MadeOf
from mpp.exchange.verify import Verified, verified_at, verify_timm_folder
from mpp.exchange.weight_files import DEEPEST, NAMED, Source, name_some, read_source
from mpp.recipe.flat import JsonMapping
from mpp.runs.records import check_new

EPS = 1e-5
"""Difference of the norms' eps that no output shows: tokens of trained models vary by about 1."""
FILTER = "timm's checkpoint filter"
"""In place of a layout: `checkpoint_filter_fn` of the model's own module in timm renamed the weights."""


@dataclass(frozen=True)
class Imported:
    """What `import_weights` made."""

    verified: Verified
    layout: str
    """Whose names the weights had, see `mpp.exchange.naming`; FILTER if timm's own filter read them."""
    prefix: str
    """What stood before them, keys of nested dictionaries among it."""
    wanted: int
    """Weights that the encoder has."""
    missing: list[str]
    """Those of them that were not there and are random now: none unless that was allowed."""
    left_out: list[str]
    """Names of what is no part of the encoder: heads, decoders, other networks."""
    mean: list[float]
    std: list[float]
    normalisation: str
    """Where mean and std are from."""

    def __str__(self) -> str:
        return "; ".join(
            [
                f"{self.wanted - len(self.missing)} of {self.wanted} weights, "
                + _naming(self.layout)
                + (f", from {name_some([self.prefix])}*" if self.prefix else ""),
                *([f"{len(self.missing)} missing, random now: {name_some(self.missing)}"] if self.missing else []),
                f"{len(self.left_out)} tensors left out" + (f" ({name_some(self.left_out)})" if self.left_out else ""),
                f"mean {self.mean} and std {self.std} are {self.normalisation}",
            ]
        )


def import_weights(
    file: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    args: JsonMapping | None = None,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    prefix: str | None = None,
    partial: bool = False,
    trust: bool = False,
) -> Imported:
    """Put the weights in a file into a model of timm's, and export that, verified.

    Args:
        file: safetensors or a pickle, or a folder of transformers' or timm's, which names its own model. Names of
            weights may be those of any of `mpp.exchange.naming`, in nested dictionaries and with a prefix.
        out: A new folder.
        model: A name of timm's. With a tag, mean and std are those of the tag.
        args: Arguments of the model.
        image_size: (H, W) in pixels; None: the model's own.
        channels: None: what the folder names, else 3.
        mean: Of pixels in [0, 1], by channel, that the weights were trained with.
        std: The same.
        prefix: Which encoder is meant, if there are several: the keys of nested dictionaries, each with a dot.
        partial: Let weights be missing; they stay random.
        trust: Open a pickle, by torch's `weights_only=True`: tensors and plain containers, nothing that runs.

    Raises:
        UserError: The file is not that, or any of the encoder's weights is missing, of another shape or kind, or not
            finite.
    """
    check_new(Path(out))
    _check_names(model, args)
    source = read_source(Path(file), trust, named=model is not None, given=mean is not None)
    model, args = _architecture(model, args or {}, source, file)
    in_chans = channels or source.channels or 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of weights that may be missing
        encoder: TimmModel = create_timm_model(
            model,
            image_size=image_size or source.image_size,
            in_chans=in_chans,
            pretrained=False,
            args=dict(args),
            key="model",
            args_key="args",
        )
    config = encoder.pretrained_cfg
    size = image_size or source.image_size or tuple(config["input_size"][1:])
    check_size(encoder, size, model, key="image_size")
    _check_eps(encoder, source.norm_eps, file)
    names = list(encoder.state_dict())
    match = _match(encoder, source.tensors, names, prefix, partial, file, model)
    _load(encoder, match, file, model)
    known = keymap.trained(source.tensors, match.layout)
    (mean_of, std_of), normalisation = _normalisation(mean, std, source, model, config, known, in_chans)
    if source.patches or (known is not None and known.masked):
        pool_patches(encoder)
    limits = "How they were trained is not known here."
    if match.missing:
        count = f"{len(match.missing)} of {len(names)} weights"
        limits += f" {count} were not in the file and are random: {name_some(match.missing)}."
    origin = Origin(
        mean=mean_of,
        std=std_of,
        input_size=(in_chans, *size),
        made=f"Weights of `{Path(file).resolve().name}`, {_naming(match.layout)}, in timm's `{model}`.",
        limits=f"{limits} Mean and std are {normalisation}.",
    )
    try:
        verified = export_model(encoder, out, origin)
    except (RuntimeError, AttributeError, NotImplementedError, ValueError, TypeError) as error:  # timm and torch
        raise UserError(f"{model} at {size[0]}×{size[1]} px: {type(error).__name__}: {one_line(error)}") from error
    left_out = match.left_out(source.tensors)
    return Imported(
        verified, match.layout, match.prefix, len(names), match.missing, left_out, mean_of, std_of, normalisation
    )


def _check_names(model: str | None, args: JsonMapping | None) -> None:
    """Raise UserError for arguments that have options of their own, and a model that timm does not have."""
    for key, instead in (("img_size", "--image-size"), ("in_chans", "--channels")):
        if key in (args or {}):
            raise UserError(f"args.{key}: is what {instead} says")
    if model is None:
        return
    architecture = model.split(".")[0]
    if ":" in model or architecture not in timm_names(architecture, "model"):
        raise UserError(
            f"model: expected a timm name, such as vit_small_patch16_224, with or without a tag; got '{model}'"
        )


def _architecture(model: str | None, args: JsonMapping, source: Source, file: str | Path) -> tuple[str, JsonMapping]:
    """Return the timm model and its arguments: as given, else as the folder names them.

    Raises:
        UserError: Nothing names a model, or the folder names another argument.
    """
    for key, value in args.items():
        stated = (source.args or {}).get(key, value)
        if stated != value:
            raise UserError(f"args.{key}: {value}, where {file}/config.json says {stated}")
    if model is not None:
        return model, {**(source.args or {}), **args}  # whatever the name's own are
    if source.model is None:
        raise UserError(
            "model: give the timm model of these weights (--model vit_base_patch16_224); only folders of "
            "transformers' and timm's say it themselves"
        )
    return source.model, {**(source.own or {}), **args}


class _Match(NamedTuple):
    """Which tensors of a file are which weights of an encoder."""

    layout: str
    prefix: str
    covered: dict[str, MadeOf]
    """By the encoder's name: what the weight is made of."""
    tensors: Mapping[str, Tensor]
    """By the names that `covered` uses, with the prefix."""
    missing: list[str]

    def left_out(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the tensors of the file that no weight is made of."""
        taken = {self.prefix + name for made in self.covered.values() for name in made.names}
        filtered = self.layout == FILTER
        return sorted(n for n in tensors if n not in taken and not (filtered and n.startswith(self.prefix)))


def _match(
    encoder: TimmModel,
    weights: Mapping[str, Tensor],
    names: list[str],
    prefix: str | None,
    partial: bool,
    file: str | Path,
    model: str,
) -> _Match:
    """Find the weights of the encoder among the tensors of a file, by the naming that covers most of them.

    Raises:
        UserError: Some are missing, and `partial` does not allow it, or none is there.
    """
    layout, own_prefix, covered = _covered(weights, names, prefix, file)
    tensors = weights
    if len(covered) < len(names):
        filtered = _filtered(encoder, weights, prefix, partial, file)
        if filtered is not None and len(filtered[1]) > len(covered):
            layout, own_prefix = FILTER, filtered[0]
            tensors = {own_prefix + name: value for name, value in filtered[1].items()}
            covered = {name: MadeOf((name,)) for name in filtered[1]}
    missing = [name for name in names if name not in covered]
    if missing and not (partial and covered):
        holds = f"it holds {name_some(list(weights))}" if weights else "it holds no weights by name"
        raise UserError(
            f"{file}: {len(missing)} of {len(names)} weights of {model}: missing: {name_some(missing)}"
            f"{_advice(encoder, missing, weights, own_prefix)}; {holds}"
        )
    return _Match(layout, own_prefix, covered, tensors, missing)


def _load(encoder: TimmModel, match: _Match, file: str | Path, model: str) -> None:
    """Put the weights into the encoder. UserError if one does not fit."""
    state: dict[str, Tensor] = encoder.state_dict()
    taken = {name: _taken(made, match.tensors, match.prefix, file) for name, made in match.covered.items()}
    encoder.load_state_dict(state | _fitting(taken, state, f"{file}: ", model))


def _naming(layout: str) -> str:
    """How weights were recognised, in a message."""
    return f"read by {FILTER}" if layout == FILTER else f"named as {layout} does"


def _fitting(taken: dict[str, Tensor], wanted: Mapping[str, Tensor], where: str, model: str) -> dict[str, Tensor]:
    """Weights as the model holds them. UserError where one has another shape or kind, or is not finite."""
    if other := [name for name in taken if taken[name].shape != wanted[name].shape]:
        shapes = ", ".join(f"{n} {tuple(taken[n].shape)}, wanted {tuple(wanted[n].shape)}" for n in other[:NAMED])
        raise UserError(
            f"{where}{len(other)} of {len(wanted)} weights of {model} have other shapes: {shapes}; is the model, the "
            "image size or the number of channels another one?"
        )
    if odd := [f"{name} ({taken[name].dtype})" for name in taken if not _fits(taken[name], wanted[name])]:
        raise UserError(f"{where}weights that are no plain numbers of their kind: {name_some(odd)}")
    state = {name: value.to(wanted[name].dtype) for name, value in taken.items()}
    if odd := [name for name, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"{where}weights that are not finite: {name_some(odd)}")
    return state


def _check_eps(encoder: TimmModel, stated_eps: float | None, file: str | Path) -> None:
    """UserError where norms would divide by something else."""
    timm_eps = next((m.eps for m in encoder.modules() if isinstance(m, torch.nn.LayerNorm)), None)
    if stated_eps is not None and timm_eps is not None and abs(stated_eps - timm_eps) > EPS:
        raise UserError(
            f"{file}/config.json: layer_norm_eps: {stated_eps:g}; timm's is {timm_eps:g} and cannot be chosen"
        )


def _normalisation(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    source: Source,
    model: str,
    config: Any,
    known: keymap.Trained | None,
    channels: int,
) -> tuple[tuple[list[float], list[float]], str]:
    """(mean, std) of pixels in [0, 1], by channel, and where they are from: the user, the folder, a tag of timm's, or
    the project whose names these are. UserError if nobody says it: most features are worth little without."""
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and (len(values) != channels or not all(0 <= v <= 1 for v in values)):
            raise UserError(f"{key}: must be {channels} numbers from 0 to 1, one for each channel; got {list(values)}")
    if std is not None and 0 in std:
        raise UserError(f"std: must be above 0; got {list(std)}")
    if (mean is None) != (std is None):
        raise UserError("mean, std: give both or neither")
    if mean is not None and std is not None:
        return ([float(v) for v in mean], [float(v) for v in std]), "as given"
    if source.mean_std and all(len(values) == channels for values in source.mean_std):
        return source.mean_std, "those of the folder"
    architecture, _, tag = model.partition(".")
    if tag:
        mean_std, by = (config["mean"], config["std"]), "timm's for this tag"
    elif known is not None and known.mean_std is not None and channels == 3:
        mean_std, by = known.mean_std, f"those of {known.by}"
    else:
        tags = _tags(architecture)
        raise UserError(
            "mean, std: nothing says what these weights were trained with. Give both, such as ImageNet's: --mean "
            "0.485,0.456,0.406 --std 0.229,0.224,0.225"
            + (f"; or name timm's own weights: --model {name_some(tags)}" if tags else "")
        )
    return (for_channels(mean_std[0], channels), for_channels(mean_std[1], channels)), by


def _tags(architecture: str) -> list[str]:
    """timm's own weights of a model, those first whose mean and std no earlier one has."""
    names = [name for name in timm.list_pretrained(f"{architecture}.*") if name != architecture]
    first: dict[Any, str] = {}
    for name in names:
        config: Any = timm.get_pretrained_cfg(name)
        first.setdefault((config.mean, config.std), name)
    return [*first.values(), *(name for name in names if name not in first.values())]


def _covered(
    weights: Mapping[str, Tensor], wanted: list[str], prefix: str | None, file: str | Path
) -> tuple[str, str, dict[str, MadeOf]]:
    """(layout, prefix, what each wanted weight is made of), of those that have most of them.

    UserError where a file holds several whole encoders and none is named.
    """
    best: tuple[str, str, dict[str, MadeOf]] = ("timm", prefix or "", {})
    for layout in keymap.names():
        by_prefix = keymap.coverage(weights, wanted, layout)
        if prefix is not None:
            prefix = f"{prefix}." if f"{prefix}." in by_prefix and prefix not in by_prefix else prefix
            by_prefix = {prefix: by_prefix.get(prefix, {})}
        whole = sorted(at for at, covered in by_prefix.items() if len(covered) == len(wanted))
        if len(whole) > 1:
            raise UserError(f"{file}: holds {len(whole)} whole encoders; say which by --prefix: {name_some(whole)}")
        for at, covered in sorted(by_prefix.items(), key=lambda item: len(item[0])):
            if len(covered) > len(best[2]):
                best = (layout, at, covered)
        if whole:
            return best
    return best


def _filtered(
    encoder: TimmModel, weights: Mapping[str, Tensor], prefix: str | None, partial: bool, file: str | Path
) -> tuple[str, dict[str, Tensor]] | None:
    """What timm's `checkpoint_filter_fn` for this model makes of the weights behind a prefix, if it makes all of them.

    prefix: the one that is asked for; None: every one that the names have is tried. partial: some of them are enough.
    UserError where a file holds several whole encoders and none is named.
    """
    rename = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return None
    wanted = encoder.state_dict()
    starts = {""} if prefix is None else {prefix, f"{prefix}."}
    for name in weights if prefix is None else ():
        parts = name.split(".")
        starts |= {".".join(parts[:depth]) + "." for depth in range(1, min(len(parts), DEEPEST))}
    fitting: dict[str, dict[str, Tensor]] = {}
    for start in sorted(starts, key=len):
        inside = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        if len(inside) < len(wanted) and not partial:
            continue
        try:
            state = rename(inside, encoder)
        except Exception:  # timm's filters are written for the files that they know
            continue
        if isinstance(state, dict):
            of_shape = {
                n: state[n] for n, v in wanted.items() if isinstance(state.get(n), Tensor) and state[n].shape == v.shape
            }
            if of_shape and (partial or len(of_shape) == len(wanted)):
                fitting[start] = of_shape
    whole = [start for start, of_shape in fitting.items() if len(of_shape) == len(wanted)]
    if len(whole) > 1:
        raise UserError(f"{file}: holds {len(whole)} whole encoders; say which by --prefix: {name_some(whole)}")
    return max(fitting.items(), key=lambda item: len(item[1]), default=None)


def _taken(made: MadeOf, weights: Mapping[str, Tensor], prefix: str, file: str | Path) -> Tensor:
    try:
        return made.of(weights, prefix)
    except (RuntimeError, NotImplementedError, ValueError, IndexError) as error:  # parts that do not stack
        raise UserError(f"{file}: {name_some([prefix + n for n in made.names])}: {one_line(error)}") from error


def _advice(encoder: TimmModel, missing: list[str], weights: Mapping[str, Tensor], prefix: str) -> str:
    """Which argument of timm's is likely to be off, where the encoder's last norm alone is missing."""
    takes = inspect.signature(type(encoder).__init__).parameters
    last = {name.rpartition(".")[0] for name in missing}
    if last == {"fc_norm"} and f"{prefix}norm.weight" in weights:
        key = "use_fc_norm" if "use_fc_norm" in takes else "fc_norm"
        return f"; its last norm is norm, over all tokens: add {key}=false"
    if last == {"norm"} and f"{prefix}fc_norm.weight" in weights:
        return "; its last norm is fc_norm, over their mean: add global_pool=avg"
    return ""


def _fits(value: Tensor, wanted: Tensor) -> bool:
    """Whether it is of numbers such as are wanted: no complex ones, no integers that weights were cut to."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and not value.is_complex() and value.is_floating_point() == wanted.is_floating_point()


def export_model(model: nn.Module, out: str | Path, origin: Origin) -> Verified:
    """Write a timm model into a new folder and verify it there.

    Args:
        model: Of timm.
        out: The folder.
        origin: Where its weights are from, for the card.

    Raises:
        UserError: `out` is not new or empty.
    """
    return verified_at(Path(out), lambda folder: save_encoder(model, folder, origin, {}), verify_timm_folder)
