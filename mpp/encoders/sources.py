"""Open an encoder: from a run, an export, or a name of timm's."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from mpp.encoders.checksums import HEAD, check_head, weights_sha256
from mpp.encoders.creation import create_at_size, create_timm_model
from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError, one_line
from mpp.recipe.sections import Architecture
from mpp.runs.records import encoder_folder


def load_head(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return weights and classes of the head that was saved beside an encoder.

    Raises:
        UserError: It is missing or damaged.
    """
    classes = check_head(folder)
    return load_file(folder / HEAD), classes


def load_encoder(source: str | Path, *, pretrained: bool = True, **timm_args: Any) -> nn.Module:
    """Load a plain timm model from a run or an export.

    Args:
        source: The folder.
        pretrained: Whether it gets its weights.
        **timm_args: Such as num_classes, img_size.

    Raises:
        UserError: It is damaged, or does not take the arguments.
    """
    folder = encoder_folder(source)
    if pretrained:
        weights_sha256(folder)
    try:
        return create_at_size(
            f"local-dir:{folder}", timm_args.pop("img_size", None), pretrained=pretrained, **timm_args
        )
    except Exception as error:  # timm, torch or safetensors, by whatever argument or byte is off
        raise UserError(f"{folder}: {type(error).__name__}: {one_line(error)}") from error


def is_timm_name(source: str) -> bool:
    """A folder comes before a model of the same name."""
    return not Path(source).exists() and timm.is_model(source.split(".")[0])


def check_source(source: str, *, key: str, more: tuple[str, ...] = ()) -> None:
    """Check that `source` is a folder, one of timm's names, or one of `more` words.

    Raises:
        UserError: It is none of them.
    """
    if source in more or Path(source).exists() or is_timm_name(source):
        return
    close = difflib.get_close_matches(source, [*more, *timm.list_models()], 3, 0.6)
    hint = f". Did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"{key}: '{source}': no such folder, and no such model of timm {timm.__version__}{hint}")


def check_size(
    model: TimmModel, size: tuple[int, int], what: str = "the encoder", *, key: str = "data.image_size"
) -> None:
    """Check that cells of the model tile the image; timm would leave out the border in silence.

    Args:
        model: Of timm.
        size: (H, W) in pixels.
        what: The model, in the message.
        key: Of the recipe that gives the size.

    Raises:
        UserError: They do not.
    """
    stride = model.feature_info[-1]["reduction"]
    if size[0] % stride or size[1] % stride:
        raise UserError(f"{key}: {what} has a stride of {stride} px; expected multiples of it, got {size[0]}×{size[1]}")


def fingerprint_of_inputs(train: str, val: str, *sources: str | None) -> str:
    """Of what something is trained and judged on: fingerprints of labeled images, and weights of these encoders.

    Names of timm's, "scratch" and None add nothing.
    """
    digest = hashlib.sha256((train + val).encode())
    for source in sources:
        if source and source != "scratch" and not is_timm_name(source):
            digest.update(weights_sha256(encoder_folder(source)).encode())
    return digest.hexdigest()


def class_names(folder: Path) -> list[str] | None:
    """Names of the classes that a fine-tuned model tells apart, in its order; None where nobody wrote them down."""
    names = json.loads((folder / "config.json").read_text()).get("label_names")
    return [str(name) for name in names] if names else None


def open_encoder(
    source: str,
    *,
    architecture: Architecture | None,
    image_size: tuple[int, int] | None,
    channels: int | None,
    pretrained: bool,
    **timm_args: object,
) -> TimmModel:
    """Open a timm model without classifier from a run, an export or one of timm's names.

    Args:
        source: A folder, a name, or "scratch".
        architecture: Arguments of the model, and its name if `source` is "scratch".
        image_size: (H, W) in pixels; None: its own.
        channels: Of the images; None: its own.
        pretrained: Whether it gets its weights.
        **timm_args: More arguments of the model.

    Raises:
        UserError: It cannot be had so.
    """
    given = architecture or Architecture()
    if source != "scratch" and given.name is not None:
        raise UserError(f"architecture.name: only with encoder: scratch; {source} has its own")
    if source == "scratch" or is_timm_name(source):
        return create_timm_model(
            given.name or source,
            image_size=image_size,
            in_chans=channels or 3,
            pretrained=pretrained,
            args={**timm_args, **given.args},
            key="architecture.name" if source == "scratch" else "encoder",
            args_key="architecture.args",
        )
    asked = {key: value for key, value in (("img_size", image_size), ("in_chans", channels)) if value}
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in given.args.items()}
    if reserved := sorted({*asked, "num_classes", "pretrained"} & args.keys()):
        raise UserError(
            f"architecture.args.{reserved[0]}: is not for a recipe to set here; see data.image_size, data.channels"
        )
    return load_encoder(source, pretrained=pretrained, num_classes=0, **asked, **{**timm_args, **args})
