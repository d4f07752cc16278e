"""Import the weights of other projects as a verified encoder folder.

The weights are opened as tensors only, renamed, compared name by name with those of the timm model, and verified.
"""

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
"""Largest difference in the eps of norms that does not show in outputs, as tokens of trained models vary by about 1."""
FILTER = "timm's checkpoint filter"
"""Stands for a layout if `checkpoint_filter_fn` in the model's timm module renamed the weights."""


@dataclass(frozen=True)
class Imported:
    """The result of `import_weights`."""

    verified: Verified
    layout: str
    """Project whose names the weights had, see `mpp.exchange.naming`. FILTER if timm's own filter read them."""
    prefix: str
    """Prefix of the names, including keys of nested dictionaries."""
    wanted: int
    """Number of weights that the encoder has."""
    missing: list[str]
    """Weights of the encoder that were not in the file and are random now. Empty unless `partial` was given."""
    left_out: list[str]
    """Names of tensors that are not part of the encoder: heads, decoders, other networks."""
    mean: list[float]
    std: list[float]
    normalisation: str
    """Source of mean and std."""

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
    """Load the weights in a file into a timm model, then export and verify the model.

    Args:
        file: A safetensors file, a pickle, or a folder of transformers or timm, which names its own model. Weights may
            have the names of any project in `mpp.exchange.naming`, in nested dictionaries and with a prefix.
        out: New folder for the encoder.
        model: timm name of the model. If it has a tag, mean and std default to those of the tag.
        args: Arguments of the timm model.
        image_size: (H, W) in pixels. None means the size in the folder, else that of the model.
        channels: Number of input channels. None means the number in the folder, else 3.
        mean: Mean of each channel that the weights were trained with, for pixels in [0, 1].
        std: Standard deviation of each channel, in the same units.
        prefix: Prefix of the encoder to import, if the file holds several: keys of nested dictionaries, each followed
            by a dot.
        partial: Whether weights may be missing. Missing weights stay random.
        trust: Whether to open a pickle. It is opened with torch's `weights_only=True`, as tensors and plain containers,
            so none of its code runs.

    Raises:
        UserError: If the file cannot be read, or a weight of the encoder is missing, has another shape or kind, or is
            not finite.
    """
    check_new(Path(out))
    _check_names(model, args)
    source = read_source(Path(file), trust, named=model is not None, given=mean is not None)
    model, args = _architecture(model, args or {}, source, file)
    in_chans = channels or source.channels or 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # weights that are missing stay at their initial values
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
    except (RuntimeError, AttributeError, NotImplementedError, ValueError, TypeError) as error:  # from timm or torch
        raise UserError(f"{model} at {size[0]}×{size[1]} px: {type(error).__name__}: {one_line(error)}") from error
    left_out = match.left_out(source.tensors)
    return Imported(
        verified, match.layout, match.prefix, len(names), match.missing, left_out, mean_of, std_of, normalisation
    )


def _check_names(model: str | None, args: JsonMapping | None) -> None:
    """Check the name of the model and its arguments.

    Raises:
        UserError: If an argument has a command-line option of its own, or timm has no such model.
    """
    for key, instead in (("img_size", "--image-size"), ("in_chans", "--channels")):
        if key in (args or {}):
            raise UserError(f"args.{key}: use {instead} instead")
    if model is None:
        return
    architecture = model.split(".")[0]
    if ":" in model or architecture not in timm_names(architecture, "model"):
        raise UserError(
            f"model: expected a timm name, such as vit_small_patch16_224, with or without a tag; got '{model}'"
        )


def _architecture(model: str | None, args: JsonMapping, source: Source, file: str | Path) -> tuple[str, JsonMapping]:
    """Return the name of the timm model and its arguments: as given, else from the folder.

    Raises:
        UserError: If neither names a model, or an argument differs from that in the folder.
    """
    for key, value in args.items():
        stated = (source.args or {}).get(key, value)
        if stated != value:
            raise UserError(f"args.{key}: {value} contradicts {file}/config.json ({stated})")
    if model is not None:
        return model, {**(source.args or {}), **args}  # all arguments, because the given model may have other defaults
    if source.model is None:
        raise UserError(
            "model: give the timm model of these weights (--model vit_base_patch16_224); only "
            "transformers and timm folders name their model"
        )
    return source.model, {**(source.own or {}), **args}


class _Match(NamedTuple):
    """The assignment of a file's tensors to the weights of an encoder."""

    layout: str
    prefix: str
    covered: dict[str, MadeOf]
    """Names in the file that each weight is made of, by the encoder's name of the weight."""
    tensors: Mapping[str, Tensor]
    """Tensors by the names in `covered`, with the prefix."""
    missing: list[str]

    def left_out(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the names of the file's tensors that no weight is made of."""
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
    """Find the weights of the encoder among the tensors of a file, with the naming that covers most weights.

    Raises:
        UserError: If a weight is missing without `partial`, or if all weights are missing.
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
    """Load the weights into the encoder. Raise UserError if one does not fit."""
    state: dict[str, Tensor] = encoder.state_dict()
    taken = {name: _taken(made, match.tensors, match.prefix, file) for name, made in match.covered.items()}
    encoder.load_state_dict(state | _fitting(taken, state, f"{file}: ", model))


def _naming(layout: str) -> str:
    """Return the words of a message for how the names of the weights were read."""
    return f"read by {FILTER}" if layout == FILTER else f"named as {layout} does"


def _fitting(taken: dict[str, Tensor], wanted: Mapping[str, Tensor], where: str, model: str) -> dict[str, Tensor]:
    """Return the weights in the dtypes of the model.

    Raises:
        UserError: If a weight has another shape or kind than in the model, or is not finite.
    """
    if other := [name for name in taken if taken[name].shape != wanted[name].shape]:
        shapes = ", ".join(f"{n} {tuple(taken[n].shape)}, expected {tuple(wanted[n].shape)}" for n in other[:NAMED])
        raise UserError(
            f"{where}{len(other)} of {len(wanted)} weights of {model} have other shapes: {shapes}; check the "
            "model, the image size and the number of channels"
        )
    if odd := [f"{name} ({taken[name].dtype})" for name in taken if not _fits(taken[name], wanted[name])]:
        raise UserError(f"{where}weights with an unsupported data type: {name_some(odd)}")
    state = {name: value.to(wanted[name].dtype) for name, value in taken.items()}
    if odd := [name for name, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"{where}weights that are not finite: {name_some(odd)}")
    return state


def _check_eps(encoder: TimmModel, stated_eps: float | None, file: str | Path) -> None:
    """Raise UserError if the stated eps of the norms differs from that of the encoder by more than EPS."""
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
    """Return (mean, std) of each channel, for pixels in [0, 1], and their source.

    The source is the user, the folder, a timm tag, or the project whose names the weights have.

    Raises:
        UserError: If the values are invalid, or if no source has them: with others most features are worth little.
    """
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
            "mean, std: unknown for these weights. Give both, such as ImageNet's: --mean "
            "0.485,0.456,0.406 --std 0.229,0.224,0.225"
            + (f"; or name timm's own weights: --model {name_some(tags)}" if tags else "")
        )
    return (for_channels(mean_std[0], channels), for_channels(mean_std[1], channels)), by


def _tags(architecture: str) -> list[str]:
    """Return timm's names of published weights of a model. One name for each distinct mean and std comes first."""
    names = [name for name in timm.list_pretrained(f"{architecture}.*") if name != architecture]
    first: dict[Any, str] = {}
    for name in names:
        config: Any = timm.get_pretrained_cfg(name)
        first.setdefault((config.mean, config.std), name)
    return [*first.values(), *(name for name in names if name not in first.values())]


def _covered(
    weights: Mapping[str, Tensor], wanted: list[str], prefix: str | None, file: str | Path
) -> tuple[str, str, dict[str, MadeOf]]:
    """Find the layout and prefix that cover most of the wanted weights.

    Returns:
        (layout, prefix, names in the file that each wanted weight is made of).

    Raises:
        UserError: If the file holds several whole encoders and no prefix chooses one.
    """
    best: tuple[str, str, dict[str, MadeOf]] = ("timm", prefix or "", {})
    for layout in keymap.names():
        by_prefix = keymap.coverage(weights, wanted, layout)
        if prefix is not None:
            prefix = f"{prefix}." if f"{prefix}." in by_prefix and prefix not in by_prefix else prefix
            by_prefix = {prefix: by_prefix.get(prefix, {})}
        whole = sorted(at for at, covered in by_prefix.items() if len(covered) == len(wanted))
        if len(whole) > 1:
            raise UserError(f"{file}: holds {len(whole)} encoders; choose one with --prefix: {name_some(whole)}")
        for at, covered in sorted(by_prefix.items(), key=lambda item: len(item[0])):
            if len(covered) > len(best[2]):
                best = (layout, at, covered)
        if whole:
            return best
    return best


def _filtered(
    encoder: TimmModel, weights: Mapping[str, Tensor], prefix: str | None, partial: bool, file: str | Path
) -> tuple[str, dict[str, Tensor]] | None:
    """Rename the weights below a prefix by timm's `checkpoint_filter_fn` for this model.

    Args:
        encoder: The timm model.
        weights: Tensors of the file by name.
        prefix: Prefix to use. None means that every prefix of the names is tried.
        partial: Whether some weights of the encoder are enough.
        file: The file, for messages.

    Returns:
        (prefix, weights by timm's names) with most weights. None if timm has no filter, or if too few weights result.

    Raises:
        UserError: If the file holds several whole encoders and no prefix chooses one.
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
        except Exception:  # a filter can fail in any way on a file that it was not written for
            continue
        if isinstance(state, dict):
            of_shape = {
                n: state[n] for n, v in wanted.items() if isinstance(state.get(n), Tensor) and state[n].shape == v.shape
            }
            if of_shape and (partial or len(of_shape) == len(wanted)):
                fitting[start] = of_shape
    whole = [start for start, of_shape in fitting.items() if len(of_shape) == len(wanted)]
    if len(whole) > 1:
        raise UserError(f"{file}: holds {len(whole)} encoders; choose one with --prefix: {name_some(whole)}")
    return max(fitting.items(), key=lambda item: len(item[1]), default=None)


def _taken(made: MadeOf, weights: Mapping[str, Tensor], prefix: str, file: str | Path) -> Tensor:
    try:
        return made.of(weights, prefix)
    except (RuntimeError, NotImplementedError, ValueError, IndexError) as error:  # parts that do not stack
        raise UserError(f"{file}: {name_some([prefix + n for n in made.names])}: {one_line(error)}") from error


def _advice(encoder: TimmModel, missing: list[str], weights: Mapping[str, Tensor], prefix: str) -> str:
    """Return advice on a timm argument that is likely wrong, if only the encoder's last norm is missing; else ""."""
    takes = inspect.signature(type(encoder).__init__).parameters
    last = {name.rpartition(".")[0] for name in missing}
    if last == {"fc_norm"} and f"{prefix}norm.weight" in weights:
        key = "use_fc_norm" if "use_fc_norm" in takes else "fc_norm"
        return f"; its last norm is norm, over all tokens: add {key}=false"
    if last == {"norm"} and f"{prefix}fc_norm.weight" in weights:
        return "; its last norm is fc_norm, over their mean: add global_pool=avg"
    return ""


def _fits(value: Tensor, wanted: Tensor) -> bool:
    """Return whether a tensor is plain (dense, on the CPU, not quantized or complex) and has the wanted kind of number.

    The kind is floating point or integer.
    """
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and not value.is_complex() and value.is_floating_point() == wanted.is_floating_point()


def export_model(model: nn.Module, out: str | Path, origin: Origin) -> Verified:
    """Write a timm model into a new folder and verify it there.

    Args:
        model: timm model.
        out: The new folder.
        origin: Source of the weights, for the model card.

    Raises:
        UserError: If `out` is not new or empty, or if verification fails.
    """
    return verified_at(Path(out), lambda folder: save_encoder(model, folder, origin, {}), verify_timm_folder)
