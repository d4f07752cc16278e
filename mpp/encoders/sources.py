"""Open an encoder from a run, an export, or the name of a timm model."""

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
    """Return weights and class names of the head that was saved with an encoder.

    Raises:
        UserError: If the head is missing or damaged.
    """
    classes = check_head(folder)
    return load_file(folder / HEAD), classes


def load_encoder(source: str | Path, *, pretrained: bool = True, **timm_args: Any) -> nn.Module:
    """Load a plain timm model from a run or an export.

    Args:
        source: Folder of the run or export.
        pretrained: Whether to load the weights.
        **timm_args: Arguments of timm's constructor, such as num_classes or img_size.

    Raises:
        UserError: If the folder is damaged, or the model does not take the arguments.
    """
    folder = encoder_folder(source)
    if pretrained:
        weights_sha256(folder)
    try:
        return create_at_size(
            f"local-dir:{folder}", timm_args.pop("img_size", None), pretrained=pretrained, **timm_args
        )
    except Exception as error:  # timm, torch and safetensors raise various errors
        raise UserError(f"{folder}: {type(error).__name__}: {one_line(error)}") from error


def is_timm_name(source: str) -> bool:
    """Return whether `source` is the name of a timm model. A folder of that name takes precedence."""
    return not Path(source).exists() and timm.is_model(source.split(".")[0])


def check_source(source: str, *, key: str, more: tuple[str, ...] = ()) -> None:
    """Check that `source` is a folder, the name of a timm model, or one of the words in `more`.

    Raises:
        UserError: If `source` is something else. The message names `key` and suggests similar names.
    """
    if source in more or Path(source).exists() or is_timm_name(source):
        return
    close = difflib.get_close_matches(source, [*more, *timm.list_models()], 3, 0.6)
    hint = f". Did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"{key}: '{source}': no such folder, and no such model of timm {timm.__version__}{hint}")


def check_size(
    model: TimmModel, size: tuple[int, int], what: str = "the encoder", *, key: str = "data.image_size"
) -> None:
    """Check that the model's cells tile the image. If they do not, timm silently leaves out the border.

    Args:
        model: timm model.
        size: (H, W) in pixels.
        what: Name of the model in the message.
        key: Key of the recipe that gives the size.

    Raises:
        UserError: If height or width is not a multiple of the model's stride.
    """
    stride = model.feature_info[-1]["reduction"]
    if size[0] % stride or size[1] % stride:
        raise UserError(f"{key}: {what} has a stride of {stride} px; expected multiples of it, got {size[0]}×{size[1]}")


def fingerprint_of_inputs(train: str, val: str, *sources: str | None) -> str:
    """Return one fingerprint of labeled images and of encoder weights.

    Args:
        train: Fingerprint of the training images.
        val: Fingerprint of the validation images.
        *sources: Encoders, as named in a recipe. Names of timm models, "scratch" and None add nothing.
    """
    digest = hashlib.sha256((train + val).encode())
    for source in sources:
        if source and source != "scratch" and not is_timm_name(source):
            digest.update(weights_sha256(encoder_folder(source)).encode())
    return digest.hexdigest()


def class_names(folder: Path) -> list[str] | None:
    """Return the class names of a fine-tuned model in the order of its logits, or None if they are not recorded."""
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
    """Open a timm model without classifier from a run, an export or the name of a timm model.

    Args:
        source: Folder, name of a timm model, or "scratch".
        architecture: Arguments of the model, and its name if `source` is "scratch".
        image_size: (H, W) in pixels. None means the model's own size.
        channels: Number of channels of the images. None means the number of a folder's model, else 3.
        pretrained: Whether to load the weights.
        **timm_args: Further arguments of the model.

    Raises:
        UserError: If the model cannot be opened with these arguments.
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
