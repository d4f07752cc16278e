"""Weights from elsewhere, as an encoder's folder: opened as tensors alone, renamed, compared name by name, verified."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import stat
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load
from torch import Tensor

from mpp import exporting, keymap
from mpp.encoders.timm_encoder import create_timm_model, timm_names
from mpp.errors import MppWarning, UserError, one_line
from mpp.keymap import MadeOf
from mpp.layouts import transformers
from mpp.records import check_new
from mpp.verifying import Verified

NAMED, LETTERS = 5, 80
"""Weights that a message names, and how much of a name."""
EPS = 1e-5
"""Difference of the norms' eps that no output shows: tokens of trained models vary by about 1."""
FILTER = "timm's checkpoint filter"
"""In place of a layout: `checkpoint_filter_fn` of the model's own module in timm renamed the weights."""
BESIDE = (
    "yacs.config.CfgNode",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmcv.utils.config.ConfigDict",
    "addict.addict.Dict",
)
"""Classes of configurations and metrics that SimMIM, mmpretrain and others save beside weights; nothing is made of
them."""
MOST_CLASSES = 100
"""Of objects beside the weights, that are left out; a pickle of more is no checkpoint (a guess)."""
DEEPEST = 8
"""Dictionaries in one another that are looked into."""


@dataclass(frozen=True)
class Imported:
    """What `import_weights` made."""

    verified: Verified
    layout: str
    """Whose names the weights had, see `mpp.layouts`; FILTER if timm's own filter read them."""
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
                + (f", from {_some([self.prefix])}*" if self.prefix else ""),
                *([f"{len(self.missing)} missing, random now: {_some(self.missing)}"] if self.missing else []),
                f"{len(self.left_out)} tensors left out" + (f" ({_some(self.left_out)})" if self.left_out else ""),
                f"mean {self.mean} and std {self.std} are {self.normalisation}",
            ]
        )


@dataclass(frozen=True)
class _Source:
    """What was found at a place: weights by name, and what is said of them beside."""

    tensors: dict[str, Tensor]
    model: str | None = None
    args: Mapping[str, Any] | None = None
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    mean_std: tuple[list[float], list[float]] | None = None
    own: Mapping[str, Any] | None = None
    """Its arguments where they are not those of its name."""
    norm_eps: float | None = None
    patches: bool = False
    """Whether its config.json says that the embedding of an image is the mean of the patch tokens."""


def import_weights(
    file: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    args: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    prefix: str | None = None,
    partial: bool = False,
    trust: bool = False,
) -> Imported:
    """Put the weights in `file` into `model` of timm's; export that to `out`, verified.

    file: safetensors or a pickle, or a folder of transformers' or timm's, which says itself which model it is. Names
    may be those of any of `mpp.layouts`, in nested dictionaries and with a prefix. model: with a tag of timm's where
    mean and std are those of the tag. args: of the model. image_size: (H, W) in pixels; None: the model's own.
    channels: 3 where nothing says otherwise. mean, std: of pixels in [0, 1], by channel, that the weights were trained
    with. prefix: with the keys of nested dictionaries, each with a dot, of the one that is meant where there are
    several. partial: let weights be missing, which stay random. trust: open a pickle, by torch's `weights_only=True`:
    tensors and plain containers, nothing that runs.
    UserError where the file is not that, and where any of the encoder's weights is missing, of another shape or kind,
    or not finite.
    """
    check_new(Path(out))
    for key, instead in (("img_size", "--image-size"), ("in_chans", "--channels")):
        if key in (args or {}):
            raise UserError(f"args.{key}: is what {instead} says")
    if model is not None:
        architecture = model.split(".")[0]
        if ":" in model or architecture not in timm_names(architecture, "model"):
            raise UserError(
                f"model: '{model}': allowed is a name of timm's, such as vit_small_patch16_224, with or without a tag"
            )
    source = _read(Path(file), trust, named=model is not None, given=mean is not None)
    for key, value in (args or {}).items():
        said = (source.args or {}).get(key, value)
        if said != value:
            raise UserError(f"args.{key}: {value}, where {file}/config.json says {said}")
    if model is None:
        if source.model is None:
            raise UserError(
                "model: give the timm model of these weights (--model vit_base_patch16_224); only folders of "
                "transformers' and timm's say it themselves"
            )
        model, args = source.model, {**(source.own or {}), **(args or {})}
    else:
        args = {**(source.args or {}), **(args or {})}  # whatever the name's own are
    found, in_chans = source.tensors, channels or source.channels or 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of weights that may be missing
        encoder: Any = create_timm_model(
            model,
            image_size=image_size or source.image_size,
            in_chans=in_chans,
            pretrained=False,
            args=dict(args or {}),
            key="model",
            args_key="args",
        )
    config = encoder.pretrained_cfg
    size = image_size or source.image_size or tuple(config["input_size"][1:])
    exporting.check_size(encoder, size, model, key="image_size")
    _check_eps(encoder, source.norm_eps, file)
    wanted: dict[str, Tensor] = encoder.state_dict()
    asked = prefix
    layout, prefix, covered = _covered(found, list(wanted), asked, file)
    found_there = found
    if len(covered) < len(wanted):
        filtered = _filtered(encoder, found, asked, partial, file)
        if filtered is not None and len(filtered[1]) > len(covered):
            layout, prefix = FILTER, filtered[0]
            found_there = {prefix + name: value for name, value in filtered[1].items()}
            covered = {name: MadeOf((name,)) for name in filtered[1]}
    missing = [name for name in wanted if name not in covered]
    if missing and not (partial and covered):
        holds = f"it holds {_some(list(found))}" if found else "it holds no weights by name"
        raise UserError(
            f"{file}: {len(missing)} of {len(wanted)} weights of {model}: missing: {_some(missing)}"
            f"{_advice(encoder, missing, found, prefix)}; {holds}"
        )
    own = {name: _taken(made, found_there, prefix, file) for name, made in covered.items()}
    encoder.load_state_dict(wanted | _fitting(own, wanted, f"{file}: ", model))
    known = keymap.trained(found, layout)
    (mean_of, std_of), normalisation = _normalisation(mean, std, source, model, config, known, in_chans)
    if source.patches or (known is not None and known.masked):
        exporting.pool_patches(encoder)
    limits = "How they were trained is not known here."
    if missing:
        limits += f" {len(missing)} of {len(wanted)} weights were not in the file and are random: {_some(missing)}."
    origin = exporting.Origin(
        mean=mean_of,
        std=std_of,
        input_size=(in_chans, *size),
        made=f"Weights of `{Path(file).resolve().name}`, {_naming(layout)}, in timm's `{model}`.",
        limits=f"{limits} Mean and std are {normalisation}.",
    )
    try:
        verified = exporting.export_model(encoder, out, origin)
    except (RuntimeError, AttributeError, NotImplementedError, ValueError, TypeError) as error:  # timm and torch
        raise UserError(f"{model} at {size[0]}×{size[1]} px: {type(error).__name__}: {one_line(error)}") from error
    taken = {prefix + name for made in covered.values() for name in made.names}
    left_out = sorted(n for n in found if n not in taken and not (layout == FILTER and n.startswith(prefix)))
    return Imported(verified, layout, prefix, len(wanted), missing, left_out, mean_of, std_of, normalisation)


def _naming(layout: str) -> str:
    """How weights were recognised, in a message."""
    return f"read by {FILTER}" if layout == FILTER else f"named as {layout} does"


def _fitting(own: dict[str, Tensor], wanted: Mapping[str, Tensor], where: str, model: str) -> dict[str, Tensor]:
    """Weights as the model holds them. UserError where one has another shape or kind, or is not finite."""
    if other := [name for name in own if own[name].shape != wanted[name].shape]:
        shapes = ", ".join(f"{n} {tuple(own[n].shape)}, wanted {tuple(wanted[n].shape)}" for n in other[:NAMED])
        raise UserError(
            f"{where}{len(other)} of {len(wanted)} weights of {model} have other shapes: {shapes}; is the model, the "
            "image size or the number of channels another one?"
        )
    if odd := [f"{name} ({own[name].dtype})" for name in own if not _fits(own[name], wanted[name])]:
        raise UserError(f"{where}weights that are no plain numbers of their kind: {_some(odd)}")
    state = {name: value.to(wanted[name].dtype) for name, value in own.items()}
    if odd := [name for name, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"{where}weights that are not finite: {_some(odd)}")
    return state


def _check_eps(encoder: Any, said: float | None, file: str | Path) -> None:
    """UserError where norms would divide by something else."""
    own = next((m.eps for m in encoder.modules() if isinstance(m, torch.nn.LayerNorm)), None)
    if said is not None and own is not None and abs(said - own) > EPS:
        raise UserError(f"{file}/config.json: layer_norm_eps: {said:g}; timm's is {own:g} and cannot be chosen")


def _normalisation(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    source: _Source,
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
        said, by = (config["mean"], config["std"]), "timm's for this tag"
    elif known is not None and known.mean_std is not None and channels == 3:
        said, by = known.mean_std, f"those of {known.by}"
    else:
        tags = _tags(architecture)
        raise UserError(
            "mean, std: nothing says what these weights were trained with. Give both, such as ImageNet's: --mean "
            "0.485,0.456,0.406 --std 0.229,0.224,0.225"
            + (f"; or name timm's own weights: --model {_some(tags)}" if tags else "")
        )
    return (exporting.for_channels(said[0], channels), exporting.for_channels(said[1], channels)), by


def _tags(architecture: str) -> list[str]:
    """timm's own weights of a model, those first whose mean and std no earlier one has."""
    names = [name for name in timm.list_pretrained(f"{architecture}.*") if name != architecture]
    first: dict[Any, str] = {}
    for name in names:
        config: Any = timm.get_pretrained_cfg(name)
        first.setdefault((config.mean, config.std), name)
    return [*first.values(), *(name for name in names if name not in first.values())]


def _read(file: Path, trust: bool, *, named: bool, given: bool) -> _Source:
    """named: the model is known, a folder need not say it; given: so are mean and std. UserError."""
    if not file.is_dir():
        return _Source(_weights(file, trust))
    try:
        config: Any = json.loads((file / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except FileNotFoundError as error:
        raise UserError(f"{file}: not a file, nor a folder with a config.json beside weights") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}/config.json: {one_line(error)}") from error
    tensors: dict[str, Tensor] = {}
    for part in _weight_files(file):
        tensors |= _weights(part, trust)
    try:
        if "architecture" in config:  # timm's own
            own = config.get("pretrained_cfg", {})
            channels, *size = own.get("input_size", (3, 224, 224))
            mean_std = ([float(v) for v in own["mean"]], [float(v) for v in own["std"]]) if "mean" in own else None
            said = {"in_chans", "img_size", "num_classes"}  # elsewhere
            args = {key: value for key, value in config.get("model_args", {}).items() if key not in said}
            name = config["architecture"]
            if not isinstance(name, str) or ":" in name:
                raise ValueError(f"architecture: {name!r}: not a name of timm's")
            if mean_std is not None:
                _check_normalisation(*mean_std)
            return _Source(tensors, name, args, (size[0], size[1]), channels, mean_std, args)
        found = transformers.architecture(config)
        side: Any = config.get("image_size", 224)
        height, width = side if isinstance(side, list) else (side, side)
        return _Source(
            tensors,
            found.name,
            found.args,
            (height, width),
            config.get("num_channels", 3),
            None if given else _processor(file),
            found.own,
            found.norm_eps,
            config.get("embedding") == "patches",
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
        if named:
            return _Source(tensors)
        what = f"no key {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{file}/config.json: {what}; or give the timm model by --model") from error


def _weight_files(folder: Path) -> list[Path]:
    """Those that a folder of transformers' keeps weights in. UserError where there are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        listed = folder / f"{name}.index.json"
        if listed.exists():
            try:
                parts = sorted(set(json.loads(listed.read_text())["weight_map"].values()))
                return [folder / Path(part).name for part in parts]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{listed}: not a list of weights' files") from error
    raise UserError(f"{folder}: neither model.safetensors nor pytorch_model.bin in it")


def _processor(folder: Path) -> tuple[list[float], list[float]] | None:
    """Mean and std, of pixels in [0, 1], of transformers' image processor, where one lies beside. ValueError."""
    try:
        found: Any = json.loads((folder / "preprocessor_config.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"preprocessor_config.json: {one_line(error)}") from error
    try:
        factor = 255 * float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 255.0
        if not found.get("do_normalize", True):
            mean, std = [0.0] * 3, [1 / factor] * 3
        else:
            mean, std = ([float(v) / factor for v in found[f"image_{key}"]] for key in ("mean", "std"))
    except KeyError:
        return None
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"preprocessor_config.json: {one_line(error)}") from error
    _check_normalisation(mean, std)
    return mean, std


def _check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """ValueError where they are not of pixels in [0, 1]."""
    if not (all(0 <= v <= 1 for v in mean) and all(0 < v <= 1 for v in std)):
        raise ValueError(
            f"mean {list(mean)} and std {list(std)} are not of pixels in [0, 1]; say them by --mean and --std"
        )


def _weights(file: Path, trust: bool) -> dict[str, Tensor]:
    return dict(_tensors(_opened(file, trust), set()))


def _covered(
    found: Mapping[str, Tensor], wanted: list[str], prefix: str | None, file: str | Path
) -> tuple[str, str, dict[str, MadeOf]]:
    """(layout, prefix, what each wanted weight is made of), of those that have most of them.

    UserError where a file holds several whole encoders and none is named.
    """
    best: tuple[str, str, dict[str, MadeOf]] = ("timm", prefix or "", {})
    for layout in keymap.names():
        by_prefix = keymap.coverage(found, wanted, layout)
        if prefix is not None:
            prefix = f"{prefix}." if f"{prefix}." in by_prefix and prefix not in by_prefix else prefix
            by_prefix = {prefix: by_prefix.get(prefix, {})}
        whole = sorted(at for at, covered in by_prefix.items() if len(covered) == len(wanted))
        if len(whole) > 1:
            raise UserError(f"{file}: holds {len(whole)} whole encoders; say which by --prefix: {_some(whole)}")
        for at, covered in sorted(by_prefix.items(), key=lambda item: len(item[0])):
            if len(covered) > len(best[2]):
                best = (layout, at, covered)
        if whole:
            return best
    return best


def _filtered(
    encoder: Any, found: Mapping[str, Tensor], prefix: str | None, partial: bool, file: str | Path
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
    for name in found if prefix is None else ():
        parts = name.split(".")
        starts |= {".".join(parts[:depth]) + "." for depth in range(1, min(len(parts), DEEPEST))}
    fitting: dict[str, dict[str, Tensor]] = {}
    for start in sorted(starts, key=len):
        inside = {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}
        if len(inside) < len(wanted) and not partial:
            continue
        try:
            state = rename(inside, encoder)
        except Exception:  # timm's filters are written for the files that they know
            continue
        if isinstance(state, dict):
            own = {
                n: state[n] for n, v in wanted.items() if isinstance(state.get(n), Tensor) and state[n].shape == v.shape
            }
            if own and (partial or len(own) == len(wanted)):
                fitting[start] = own
    whole = [start for start, own in fitting.items() if len(own) == len(wanted)]
    if len(whole) > 1:
        raise UserError(f"{file}: holds {len(whole)} whole encoders; say which by --prefix: {_some(whole)}")
    return max(fitting.items(), key=lambda item: len(item[1]), default=None)


def _taken(made: MadeOf, found: Mapping[str, Tensor], prefix: str, file: str | Path) -> Tensor:
    try:
        return made.of(found, prefix)
    except (RuntimeError, NotImplementedError, ValueError, IndexError) as error:  # parts that do not stack
        raise UserError(f"{file}: {_some([prefix + n for n in made.names])}: {one_line(error)}") from error


def _advice(encoder: Any, missing: list[str], found: Mapping[str, Tensor], prefix: str) -> str:
    """Which argument of timm's is likely to be off, where the encoder's last norm alone is missing."""
    takes = inspect.signature(type(encoder).__init__).parameters
    last = {name.rpartition(".")[0] for name in missing}
    if last == {"fc_norm"} and f"{prefix}norm.weight" in found:
        key = "use_fc_norm" if "use_fc_norm" in takes else "fc_norm"
        return f"; its last norm is norm, over all tokens: add {key}=false"
    if last == {"norm"} and f"{prefix}fc_norm.weight" in found:
        return "; its last norm is fc_norm, over their mean: add global_pool=avg"
    return ""


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
        # training programs keep their arguments and metrics beside the weights
        found, left_out = _plain_parts(file)
    except UserError:
        raise
    except Exception as error:  # torch, zipfile and pickle each have their own
        if refused := _REFUSED.search(str(error)):
            raise UserError(f"{file}: holds more than tensors and plain containers: {_some([refused[1]])}") from error
        raise UserError(f"{file}: damaged, or not of torch.save: {type(error).__name__}") from error
    if left_out:
        warnings.warn(
            f"{file}: objects of {_some(left_out)} are left out; tensors beside them are read", MppWarning, stacklevel=4
        )
    return found


def _plain_parts(file: Path) -> tuple[Any, list[str]]:
    """Read the tensors and plain containers of a pickle, and leave out objects of other classes.

    A dictionary takes the place of such an object. The code of its class is never looked for.

    Returns:
        (what the file holds, names of the classes that were left out).

    Raises:
        UserError: An object is of a kind, such as a list with methods of its own, that no dictionary can stand for.
    """
    left_out: list[str] = []
    while True:
        stand_ins: list[Any] = [(_Nothing, name) for name in left_out]
        # training programs keep their arguments and metrics beside the weights
        with (
            torch.serialization.safe_globals([*_harmless(), *stand_ins]),
            warnings.catch_warnings(action="ignore"),
            open(file, "rb") as stream,  # of a path torch would believe the ending
        ):
            try:
                return torch.load(stream, map_location="cpu", weights_only=True), left_out
            except Exception as error:
                unknown = _unknown_classes(file, error, left_out)
                if not unknown and left_out and not _REFUSED.search(str(error)):
                    raise UserError(
                        f"{file}: objects of {_some(left_out)} cannot be left out; save the weights alone: "
                        "torch.save(model.state_dict(), …)"
                    ) from error
                if not unknown:
                    raise
                left_out += unknown


def _unknown_classes(file: Path, error: Exception, known: list[str]) -> list[str]:
    """Classes in a pickle that torch refuses and that are not in `known`, at most MOST_CLASSES of all."""
    refused = _REFUSED.search(str(error))
    if not refused or refused[1] in known:
        return []
    try:  # all at once, without loading anything; of files in torch's present format
        with torch.serialization.safe_globals(_harmless()):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # of an older format: one class after the other, as torch meets them
        found = [refused[1]]
    new = [name for name in dict.fromkeys([refused[1], *found]) if name not in known]
    return new if len(known) + len(new) <= MOST_CLASSES else []


_REFUSED = re.compile(r"(?i)unsupported (?:global: )?(?:GLOBAL|class) (\S+)")
"""How torch names the class that it refuses."""


class _Nothing:
    """What is made of objects beside the weights: a dictionary, whose attributes nobody reads."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        return OrderedDict()


def _harmless() -> list[Any]:
    """Classes that torch's weights_only does not know and that run nothing: arguments, configurations, numbers."""
    core: Any = np._core.multiarray  # type: ignore[attr-defined]
    arrays = [
        (getattr(core, n), f"numpy.{c}.multiarray.{n}") for n in ("scalar", "_reconstruct") for c in ("core", "_core")
    ]
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"}
    return [argparse.Namespace, np.ndarray, np.dtype, *kinds, *arrays, *((_Nothing, name) for name in BESIDE)]


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


def _fits(value: Tensor, wanted: Tensor) -> bool:
    """Whether it is of numbers such as are wanted: no complex ones, no integers that weights were cut to."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and not value.is_complex() and value.is_floating_point() == wanted.is_floating_point()


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    shown = (json.dumps(n)[1:-1] for n in names[:NAMED])
    cut = [n if len(n) <= LETTERS else n[:LETTERS] + "…" for n in shown]
    return ", ".join(cut) + (f" and {more} more" if more > 0 else "")
