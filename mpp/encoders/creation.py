"""Make timm models by name. If that fails, the error message is one line."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from torch import nn

from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError, one_line
from mpp.recipe.values import TimmArgs


def timm_names(pattern: str, key: str) -> list[str]:
    """List the timm models that match a name or pattern.

    Raises:
        UserError: If no model matches. The message names `key`, the recipe's key.
    """
    names: list[str] = timm.list_models(pattern) if pattern else []
    if not names:
        close = difflib.get_close_matches(pattern, timm.list_models(), 3, 0.6)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        folder = "no such folder, and " if "/" in pattern else ""
        raise UserError(f"{key}: {folder}timm {timm.__version__} has no model '{pattern}'.{hint}")
    return names


def create_at_size(name: str, image_size: tuple[int, int] | None, **args: Any) -> TimmModel:
    """Call `timm.create_model` with an image size, or without it if the family takes any size.

    If `image_size` is None, the model keeps its own size.
    """
    try:
        return timm.create_model(name, **args, **({"img_size": image_size} if image_size else {}))  # type: ignore[arg-type]
    except TypeError as error:
        if "img_size" not in str(error) or image_size is None:
            raise
        return timm.create_model(name, **args)


def create_timm_model(
    name: str,
    *,
    image_size: tuple[int, int] | None,
    in_chans: int,
    pretrained: bool,
    args: TimmArgs,
    key: str = "encoder.name",
    args_key: str = "encoder.args",
) -> nn.Module:
    """Make a timm model without classifier.

    Args:
        name: Name of a timm model, or "local-dir:" and a folder.
        image_size: (H, W) in pixels. None means the model's own size.
        in_chans: Number of channels of the images.
        pretrained: Whether to load the published weights, or those of the folder.
        args: Arguments of the model's constructor.
        key: Key of the recipe that names the model, for messages.
        args_key: Key of the recipe that gives `args`, for messages.

    Raises:
        UserError: If the name, an argument or the size is wrong, or the weights cannot be downloaded.
    """
    for number in ("depth", "embed_dim", "num_heads"):
        value = args.get(number, 1)
        stages = value if isinstance(value, list | tuple) and value else [value]  # hierarchical families have several
        if any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in stages):
            raise UserError(f"{args_key}.{number}: must be a whole number >= 1; got {value!r}")
    patch_size = args.get("patch_size", 16)
    if not isinstance(patch_size, int) or isinstance(patch_size, bool) or patch_size < 1:
        raise UserError(f"{args_key}.patch_size: square patches, one number of pixels >= 1; got {patch_size!r}")
    if ":" not in name:
        timm_names(name.split(".")[0], key)
    for reserved in ("num_classes", "in_chans", "img_size", "pretrained", "features_only"):
        if reserved in args:
            raise UserError(
                f"{args_key}.{reserved}: is not for a recipe to set here; see data.image_size, data.channels"
            )
    for loading in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "cache_dir"):
        if loading in args:  # these may open pickles
            raise UserError(f"{args_key}.{loading}: weights from elsewhere come by `mpp import`")
    for argument, value in args.items():
        if value is None:  # timm would silently ignore it; most likely a space is missing after a colon
            raise UserError(f"{args_key}.{argument}: has no value")
    for key_of_list, value in args.items():  # YAML has only lists, but timm compares with tuples
        if isinstance(value, list):
            args = {**args, key_of_list: tuple(value)}
    try:
        return create_at_size(name, image_size, pretrained=pretrained, num_classes=0, in_chans=in_chans, **args)
    except TypeError as error:
        raise UserError(f"{args_key}: {name} does not take this: {one_line(error)}") from error
    except Exception as error:  # timm, torch and the hub raise many kinds, such as ZeroDivisionError
        if pretrained and _of_the_hub(error):
            raise UserError(
                f"{key}: the published weights of {name} cannot be loaded ({type(error).__name__}; no network?). Use "
                "pretrained: false, or the folder of a run or an export"
            ) from error
        words = one_line(error)
        raise UserError(
            f"{key}: {name} at {'×'.join(map(str, image_size)) + ' px' if image_size else 'its own size'} with {args}: "
            f"{type(error).__name__}: {words}"
        ) from error


def _of_the_hub(error: BaseException | None) -> bool:
    """Return whether huggingface_hub or the network caused an error."""
    while error is not None:
        if type(error).__module__.startswith(("huggingface_hub", "httpx", "urllib", "requests")):
            return True
        error = error.__cause__ or error.__context__
    return False
