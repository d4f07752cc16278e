"""How the images of an encoder were read and normalised, filled into a recipe."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
import yaml

from mpp.encoders.sources import is_timm_name
from mpp.errors import MppWarning, UserError
from mpp.recipe.sections import DECODING, ImageData
from mpp.runs.records import encoder_folder, timm_folder

Data = TypeVar("Data", bound=ImageData)


def stored_recipe(folder: Path) -> dict[str, Any]:
    """The recipe in an encoder's folder, as it stands there; nothing for one made elsewhere."""
    try:
        values = yaml.safe_load((folder / "recipe.yaml").read_text())
        return values if isinstance(values, dict) and isinstance(values["data"], dict) else {}
    except (OSError, yaml.YAMLError, KeyError):
        return {}


def value_range_of(recipe: dict[str, Any], channels: int) -> Any:
    """How images were read that were not read as 8 bit: two numbers, or "type"; None for those that were."""
    stated = recipe.get("data", {}).get("value_range")
    return tuple(stated) if stated else None if channels in (1, 3, 4) else "type"


def own_normalisation(source: str, channels: int) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation, of pixels in [0, 1], that an encoder was trained with; None where nobody knows."""
    if source == "scratch":
        return None
    config: Any = timm.get_pretrained_cfg(source) if is_timm_name(source) else None
    if config is not None:
        return for_channels(config.mean, channels), for_channels(config.std, channels)
    try:
        stored = json.loads((encoder_folder(source) / "config.json").read_text())["pretrained_cfg"]
        return for_channels(stored["mean"], channels), for_channels(stored["std"], channels)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_as(source: str, data: Data, *, warn: bool) -> Data:
    """Fill in how an encoder's images were read, where a recipe does not say it: channels, formats,
    max_image_pixels, value_range, nodata.

    Args:
        source: The encoder, as a recipe names it.
        warn: Say it if the recipe gives other channels than the encoder has.

    Raises:
        UserError: The recipe's keys do not go together with what is filled in.
    """
    folder = timm_folder(source)
    stored = stored_recipe(folder).get("data", {}) if folder else {}
    filled: dict[str, Any] = {}
    own = _channels(folder) if folder else None
    if own is not None and own != data.channels:
        if "channels" not in data.model_fields_set:
            filled["channels"] = own
        elif warn:
            warnings.warn(
                f"data.channels: {data.channels}, but the encoder was trained with {own}: its first layer is summed up "
                f"or repeated. Left out, {own} is taken",
                MppWarning,
                stacklevel=4,
            )
    if "max_image_pixels" not in data.model_fields_set and stored.get("max_image_pixels"):
        filled["max_image_pixels"] = max(stored["max_image_pixels"], data.max_image_pixels)
    if "formats" not in data.model_fields_set:
        filled["formats"] = _all_formats(stored)
    if own in (None, filled.get("channels", data.channels)):  # ranges of other channels are of other images
        for key in ("value_range", "nodata"):
            if stored.get(key) is not None and getattr(data, key) is None:
                filled[key] = tuple(stored[key]) if isinstance(stored[key], list) else stored[key]
    found = data.model_copy(update=filled)
    for key in ("mean", "std"):
        values = getattr(found, key)
        if values is not None and len(values) != found.channels:
            raise UserError(f"data.{key}: has {len(values)} values; the encoder has {found.channels} channels")
    found.check_nodata()
    return found


def _all_formats(stored: Mapping[str, Any]) -> tuple[str, ...]:
    """Formats of images: those that are read unless a recipe says otherwise, and those of a stored recipe."""
    return tuple(dict.fromkeys((*DECODING["formats"], *stored.get("formats", ()))))


def _channels(folder: Path) -> int | None:
    """Of the images that the encoder in a timm folder takes; None if it does not say."""
    try:
        found = json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"][0]
        return found if type(found) is int and found > 0 else None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def decoding_of(folder: Path, channels: int) -> dict[str, Any]:
    """How the images of the run that made a timm folder were read, as `decode_crop` takes it."""
    stored = stored_recipe(folder)
    data = stored.get("data", {})
    found: dict[str, Any] = {"channels": channels, "formats": _all_formats(data)}
    found["max_image_pixels"] = max(data.get("max_image_pixels", 0), DECODING["max_image_pixels"])
    value_range = value_range_of(stored, channels)
    return found if value_range is None else found | {"value_range": value_range, "nodata": data.get("nodata")}


def normalised_as(source: str, data: Data, *, warn: bool) -> Data:
    """Fill in all that an encoder's images were read and normalised with, where a recipe does not say it: what
    `read_as` fills in, mean and std. A warning if the recipe gives other values than the encoder's."""
    data = read_as(source, data, warn=warn)
    own = own_normalisation(source, data.channels)
    if own is None:
        return data
    for key, value in zip(("mean", "std"), own, strict=True):
        given = getattr(data, key)
        if warn and given is not None and list(given) != value:
            shown = ", ".join(f"{v:g}" for v in value)
            warnings.warn(
                f"data.{key}: the encoder was trained with [{shown}]; left out, that is taken", MppWarning, stacklevel=4
            )
    mean, std = (tuple(getattr(data, k) or v) for k, v in zip(("mean", "std"), own, strict=True))
    return data.model_copy(update={"mean": mean, "std": std})


def for_channels(values: Sequence[float], channels: int) -> list[float]:
    """Of other channels than its own timm sums or repeats the first layer's weights: they share the mean of these."""
    found = [float(v) for v in values]
    return found if len(found) == channels else [sum(found) / len(found)] * channels
