"""Open weight files of other projects as tensors, without running code from them."""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from mpp.errors import MppWarning, UserError, one_line
from mpp.exchange.naming import transformers
from mpp.recipe.flat import JsonMapping

NAMED, LETTERS = 5, 80
"""Most weights that a message names, and most characters of each name."""
BESIDE = (
    "yacs.config.CfgNode",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmcv.utils.config.ConfigDict",
    "addict.addict.Dict",
)
"""Classes of configurations and metrics that SimMIM, mmpretrain and others save together with weights. Their objects
are replaced by empty dictionaries."""
MOST_CLASSES = 100
"""Most classes of other objects that are left out. A pickle with more of them is not a checkpoint (a guess)."""
DEEPEST = 8
"""Deepest level of nested dictionaries that is searched."""


@dataclass(frozen=True)
class Source:
    """Weights by name, and what accompanying files record about them."""

    tensors: dict[str, Tensor]
    model: str | None = None
    args: JsonMapping | None = None
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    mean_std: tuple[list[float], list[float]] | None = None
    own: JsonMapping | None = None
    """Arguments that differ from the defaults of the model's name."""
    norm_eps: float | None = None
    patches: bool = False
    """Whether config.json defines the embedding of an image as the mean of the patch tokens."""


def read_source(file: Path, trust: bool, *, named: bool, given: bool) -> Source:
    """Read weights and a description of their model from a file or folder.

    Args:
        file: A file of weights, or a folder with a config.json.
        trust: Whether pickles are read.
        named: Whether the user names the model, so that the folder need not describe it.
        given: Whether the user gives mean and std.

    Raises:
        UserError: If the file or folder cannot be read, or does not describe the model.
    """
    if not file.is_dir():
        return Source(count_weights(file, trust))
    try:
        config = json.loads((file / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except FileNotFoundError as error:
        raise UserError(f"{file}: not a file, nor a folder with a config.json beside weights") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}/config.json: {one_line(error)}") from error
    tensors: dict[str, Tensor] = {}
    for part in _weight_files(file):
        tensors |= count_weights(part, trust)
    try:
        if "architecture" in config:  # a folder of timm
            timm_config = config.get("pretrained_cfg", {})
            channels, *size = timm_config.get("input_size", (3, 224, 224))
            mean_std = (
                ([float(v) for v in timm_config["mean"]], [float(v) for v in timm_config["std"]])
                if "mean" in timm_config
                else None
            )
            elsewhere = {"in_chans", "img_size", "num_classes"}  # channels and size are read above; heads are left out
            args = {key: value for key, value in config.get("model_args", {}).items() if key not in elsewhere}
            name = config["architecture"]
            if not isinstance(name, str) or ":" in name:
                raise ValueError(f"architecture: {name!r}: not a name of timm's")
            if mean_std is not None:
                _check_normalisation(*mean_std)
            return Source(tensors, name, args, (size[0], size[1]), channels, mean_std, args)
        described = transformers.architecture(config)
        side = config.get("image_size", 224)
        height, width = side if isinstance(side, list) else (side, side)
        return Source(
            tensors,
            described.name,
            described.args,
            (height, width),
            config.get("num_channels", 3),
            None if given else _processor(file),
            described.own,
            described.norm_eps,
            config.get("embedding") == "patches",
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
        if named:
            return Source(tensors)
        what = f"no key {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{file}/config.json: {what}; or give the timm model by --model") from error


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder of transformers or timm.

    Raises:
        UserError: If there are none, or if the list of files cannot be read.
    """
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
    """Return mean and std of transformers' image processor, for pixels in [0, 1]. None if the folder has no processor.

    Raises:
        ValueError: If the processor's file cannot be read or has values that are not for pixels in [0, 1].
    """
    try:
        processor = json.loads((folder / "preprocessor_config.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"preprocessor_config.json: {one_line(error)}") from error
    try:
        factor = 255 * float(processor.get("rescale_factor", 1 / 255)) if processor.get("do_rescale", True) else 255.0
        if not processor.get("do_normalize", True):
            mean, std = [0.0] * 3, [1 / factor] * 3
        else:
            mean, std = ([float(v) / factor for v in processor[f"image_{key}"]] for key in ("mean", "std"))
    except KeyError:
        return None
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"preprocessor_config.json: {one_line(error)}") from error
    _check_normalisation(mean, std)
    return mean, std


def _check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ValueError if mean or std are not for pixels in [0, 1]."""
    if not (all(0 <= v <= 1 for v in mean) and all(0 < v <= 1 for v in std)):
        raise ValueError(f"mean {list(mean)} and std {list(std)} are not of pixels in [0, 1]; give --mean and --std")


def count_weights(file: Path, trust: bool) -> dict[str, Tensor]:
    return dict(_tensors(open_weights(file, trust), set()))


def open_weights(file: Path, trust: bool) -> Any:
    """Return the contents of a file of weights. The format is detected from its first bytes, not from its name.

    Raises:
        UserError: If the file cannot be read as weights, or is a pickle and `trust` is not set.
    """
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
    except Exception as error:  # safetensors raises errors of its own and of Python
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
        weights, left_out = _plain_parts(file)
    except UserError:
        raise
    except Exception as error:  # torch, zipfile and pickle raise errors of their own
        if refused := _REFUSED.search(str(error)):
            raise UserError(
                f"{file}: holds more than tensors and plain containers: {name_some([refused[1]])}"
            ) from error
        raise UserError(f"{file}: damaged, or not of torch.save: {type(error).__name__}") from error
    if left_out:
        warnings.warn(
            f"{file}: objects of {name_some(left_out)} are left out; tensors beside them are read",
            MppWarning,
            stacklevel=4,
        )
    return weights


def _plain_parts(file: Path) -> tuple[object, list[str]]:
    """Read the tensors and plain containers of a pickle, and leave out objects of other classes.

    Each object of another class is replaced by an empty dictionary. The code of its class is never imported.

    Returns:
        (contents of the file, names of the classes that were left out).

    Raises:
        UserError: If an object cannot be replaced by a dictionary, such as a subclass of list.
    """
    left_out: list[str] = []
    while True:
        stand_ins = [(_Nothing, name) for name in left_out]
        # Training programs save their arguments and metrics together with the weights.
        with (
            torch.serialization.safe_globals([*_harmless(), *stand_ins]),
            warnings.catch_warnings(action="ignore"),
            open(file, "rb") as stream,  # given a path, torch would choose the format by the ending of the name
        ):
            try:
                return torch.load(stream, map_location="cpu", weights_only=True), left_out
            except Exception as error:
                unknown = _unknown_classes(file, error, left_out)
                if not unknown and left_out and not _REFUSED.search(str(error)):
                    raise UserError(
                        f"{file}: objects of {name_some(left_out)} cannot be left out; save the weights alone: "
                        "torch.save(model.state_dict(), …)"
                    ) from error
                if not unknown:
                    raise
                left_out += unknown


def _unknown_classes(file: Path, error: Exception, known: list[str]) -> list[str]:
    """Return the classes in a pickle that torch refuses and that are not in `known`.

    Nothing is returned if there would be more than MOST_CLASSES together with `known`.
    """
    refused = _REFUSED.search(str(error))
    if not refused or refused[1] in known:
        return []
    try:  # files in torch's present format: find all classes at once, without loading anything
        with torch.serialization.safe_globals(_harmless()):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # files in an older format: one class after the other, as torch encounters them
        unsafe = [refused[1]]
    new = [name for name in dict.fromkeys([refused[1], *unsafe]) if name not in known]
    return new if len(known) + len(new) <= MOST_CLASSES else []


_REFUSED = re.compile(r"(?i)unsupported (?:global: )?(?:GLOBAL|class) (\S+)")
"""Pattern of torch's error message, with the name of the class that it refuses."""


class _Nothing:
    """Stand-in for the classes of other objects in a pickle. It creates an empty dictionary."""

    def __new__(cls, *args: object, **options: object) -> Any:
        return OrderedDict()


def _harmless() -> list[Any]:
    """Return classes that run no code but that torch's weights_only refuses: arguments, configurations, numbers."""
    core = np._core.multiarray  # type: ignore[attr-defined]
    arrays = [
        (getattr(core, n), f"numpy.{c}.multiarray.{n}") for n in ("scalar", "_reconstruct") for c in ("core", "_core")
    ]
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"}
    return [argparse.Namespace, np.ndarray, np.dtype, *kinds, *arrays, *((_Nothing, name) for name in BESIDE)]


def _compare_checksums(file: Path) -> None:
    """Raise BadZipFile if a part does not match its checksum, which torch does not check."""
    with zipfile.ZipFile(file) as packed:
        for part in packed.infolist():
            if part.CRC:  # torch can be configured to write no checksums
                with packed.open(part) as stream:
                    while stream.read(1 << 20):
                        pass


def _tensors(loaded: object, seen: set[int], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dictionaries with their names, which begin with the keys of the outer dictionaries.

    Args:
        loaded: Contents of a file.
        seen: Ids of dictionaries that were already searched.
        prefix: Beginning of the names.
        depth: Number of outer dictionaries.
    """
    if isinstance(loaded, dict) and depth < DEEPEST and id(loaded) not in seen:
        seen.add(id(loaded))  # a dictionary that contains itself many times would take exponential time
        for key, value in dict.items(loaded):  # not loaded.items(), which a pickle may have replaced
            if isinstance(value, Tensor):
                plain = type(value) is Tensor  # a Parameter may have attributes that the pickle set
                yield prefix + str(key), value if plain else torch.Tensor.as_subclass(value, Tensor)
            else:
                yield from _tensors(value, seen, f"{prefix}{key}.", depth + 1)


def name_some(names: list[str]) -> str:
    """Return the first NAMED of these names, each cut to LETTERS characters, and how many more there are."""
    more = len(names) - NAMED
    shown = (json.dumps(n)[1:-1] for n in names[:NAMED])
    cut = [n if len(n) <= LETTERS else n[:LETTERS] + "…" for n in shown]
    return ", ".join(cut) + (f" and {more} more" if more > 0 else "")
