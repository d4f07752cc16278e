"""Fill in the recipe keys that come from the encoder: how its images were read and normalised."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import timm
import yaml

from mpp.encoders.sources import is_timm_name
from mpp.errors import MppWarning, UserError
from mpp.recipe.evaluate import EvaluateRecipe
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.flat import JsonMapping, JsonObject
from mpp.recipe.loading import check_recipe
from mpp.recipe.pretrain import PretrainRecipe
from mpp.recipe.sections import DECODING, Decoding, ImageData, ValueRange
from mpp.runs.records import encoder_folder, timm_folder

NAMED_KEYS = ("channels", "value_range", "nodata", "mean", "std")
"""Keys that an error message lists if they were filled in from the encoder."""

R = TypeVar("R", PretrainRecipe, FinetuneRecipe, EvaluateRecipe)


def stored_recipe(folder: Path) -> JsonObject:
    """Return the recipe in an encoder's folder, unchecked, or {} if the folder has no readable recipe."""
    try:
        values = yaml.safe_load((folder / "recipe.yaml").read_text())
        return values if isinstance(values, dict) and isinstance(values["data"], dict) else {}
    except (OSError, yaml.YAMLError, KeyError):
        return {}


def value_range_of(recipe: JsonObject, channels: int) -> ValueRange | None:
    """Return the value range with which images were read: two numbers, or "type" for the range of their data type.

    None means that they were read as 8-bit images.
    """
    stated = recipe.get("data", {}).get("value_range")
    return tuple(stated) if stated else None if channels in (1, 3, 4) else "type"


def own_normalisation(source: str, channels: int) -> tuple[list[float], list[float]] | None:
    """Return the mean and standard deviation that an encoder was trained with, for pixels in [0, 1].

    None means that they are unknown.
    """
    if source == "scratch":
        return None
    config = timm.get_pretrained_cfg(source) if is_timm_name(source) else None
    if config is not None:
        return for_channels(config.mean, channels), for_channels(config.std, channels)
    try:
        stored = json.loads((encoder_folder(source) / "config.json").read_text())["pretrained_cfg"]
        return for_channels(stored["mean"], channels), for_channels(stored["std"], channels)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def resolve(recipe: R, source: str | None, *, warn: bool, normalise: bool = True) -> R:
    """Fill in the keys that a recipe takes from its encoder, and check the result. It does not change afterwards.

    Args:
        recipe: Recipe as the user gave it.
        source: Encoder, as named in the recipe. None means a new encoder with random weights.
        warn: Whether to warn if the recipe gives other values than the encoder was trained with.
        normalise: Whether to fill in mean and std as well.

    Raises:
        UserError: If the recipe is invalid together with the values that are filled in.
    """
    filled = keys_of_images(source, recipe.data, warn=warn) if source else {}
    if source and normalise:
        channels = filled.get("channels", recipe.data.channels)
        filled |= _normalisation(source, recipe.data, channels, warn=warn)
    resolved = recipe
    if filled:
        values = recipe.model_dump(mode="json", exclude_unset=True)
        values["data"] |= filled
        try:
            resolved = check_recipe(values, type(recipe))
        except UserError as error:
            named = ", ".join(f"data.{key}={_plain(filled[key])}" for key in filled if key in NAMED_KEYS)
            lines = [line.removeprefix("recipe: ") for line in str(error).splitlines()]
            raise UserError("\n".join(f"{line}; {source} was trained with {named}" for line in lines)) from error
    if resolved.data.nodata is not None and resolved.data.eight_bit:
        raise UserError("data.nodata: only with data.value_range, or data.channels other than 1, 3 and 4")
    return resolved


def keys_of_images(source: str, data: ImageData, *, warn: bool) -> JsonObject:
    """Return how the images of an encoder were read, as values of the keys of `data` that the recipe does not give.

    The keys are channels, formats, max_image_pixels, value_range and nodata.

    Args:
        source: Encoder, as named in the recipe.
        data: Section `data` of the recipe.
        warn: Whether to warn if the recipe gives another number of channels than the encoder has.

    Raises:
        UserError: If the recipe's mean or std does not have one value per channel.
    """
    folder = timm_folder(source)
    stored = stored_recipe(folder).get("data", {}) if folder else {}
    filled: JsonObject = {}
    trained_channels = _channels(folder) if folder else None
    if trained_channels is not None and trained_channels != data.channels:
        if "channels" not in data.model_fields_set:
            filled["channels"] = trained_channels
        elif warn:
            warnings.warn(
                f"data.channels: {data.channels}, but the encoder was trained with {trained_channels}: its first layer "
                f"is summed up or repeated. Left out, {trained_channels} is taken",
                MppWarning,
                stacklevel=4,
            )
    if "max_image_pixels" not in data.model_fields_set and stored.get("max_image_pixels"):
        filled["max_image_pixels"] = max(stored["max_image_pixels"], data.max_image_pixels)
    if "formats" not in data.model_fields_set:
        filled["formats"] = list(_all_formats(stored))
    channels = filled.get("channels", data.channels)
    if trained_channels in (None, channels):  # ranges do not apply to images of other channels
        given = {"value_range": data.value_range, "nodata": data.nodata}
        filled |= {key: stored[key] for key, value in given.items() if value is None and stored.get(key) is not None}
    for key, values in (("mean", data.mean), ("std", data.std)):
        if values is not None and len(values) != channels:
            raise UserError(f"data.{key}: has {len(values)} values; the encoder has {channels} channels")
    return filled


def _normalisation(source: str, data: ImageData, channels: int, *, warn: bool) -> JsonObject:
    """Return mean and std of the encoder, unless the recipe gives them. Warn if the recipe gives other values."""
    mean_std = own_normalisation(source, channels)
    if mean_std is None:
        return {}
    filled = {}
    for key, given, value in (("mean", data.mean, mean_std[0]), ("std", data.std, mean_std[1])):
        if given is None:
            filled[key] = value
        elif warn and list(given) != value:
            shown = ", ".join(f"{v:g}" for v in value)
            warnings.warn(
                f"data.{key}: the encoder was trained with [{shown}]; left out, that is taken", MppWarning, stacklevel=5
            )
    return filled


def _plain(value: object) -> str:
    return json.dumps(value).replace(" ", "")


def _all_formats(stored: JsonMapping) -> tuple[str, ...]:
    """Return the default image formats, followed by those of a stored recipe."""
    return tuple(dict.fromkeys((*DECODING["formats"], *stored.get("formats", ()))))


def _channels(folder: Path) -> int | None:
    """Return the number of channels that the encoder in a timm folder takes, or None if it is not recorded."""
    try:
        channels = json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"][0]
        return channels if type(channels) is int and channels > 0 else None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def decoding_of(folder: Path, channels: int) -> Decoding:
    """Return how images were read in the run that made a timm folder.

    Args:
        folder: timm folder.
        channels: Number of channels of the images.
    """
    stored = stored_recipe(folder)
    data = stored.get("data", {})
    decoding: Decoding = {
        "channels": channels,
        "formats": _all_formats(data),
        "max_image_pixels": max(data.get("max_image_pixels", 0), DECODING["max_image_pixels"]),
    }
    if value_range := value_range_of(stored, channels):
        decoding["value_range"], decoding["nodata"] = value_range, data.get("nodata")
    return decoding


def for_channels(values: Sequence[float], channels: int) -> list[float]:
    """Return one value per channel. If the number of channels differs, all channels get the mean of the values.

    In that case timm sums or repeats the weights of the first layer.
    """
    floats = [float(v) for v in values]
    return floats if len(floats) == channels else [sum(floats) / len(floats)] * channels
